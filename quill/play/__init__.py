"""The page in the browser: its server, what its panels show, and the runs that it lists and starts."""
