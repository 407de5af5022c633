"""The exception for every mistake that a user can make. quill/cli.py prints it as one line and exits with code 2."""


class UserError(Exception):
    """One line that says what is wrong, where it is, and which flag or command fixes it."""


def check(is_right: object, problem: str) -> None:
    """Raise a UserError that says `problem` unless `is_right`: an assert for what a user can cause."""
    if not is_right:
        raise UserError(problem)
