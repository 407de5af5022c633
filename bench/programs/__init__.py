"""Programs that a bench starts in processes of their own: options as JSON on stdin, the result as JSON on stdout."""
