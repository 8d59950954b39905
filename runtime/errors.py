"""The one exception that users are meant to see."""


class UserError(Exception):
    """Something the user can act on. The message is one line: what is wrong, and what to do."""
