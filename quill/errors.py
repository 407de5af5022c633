"""The one exception that means "the user can mend this": a single line, no traceback, exit code 2."""


class UserError(Exception):
    """Says what is wrong, where, and the command or flag that mends it, in one line."""
