"""Options: what each command takes (`_schema`), how they are read (`_cli`), and one file for each run."""
