"""The exceptions that users are meant to see."""


class UserError(Exception):
    """Something the user can act on. The message is one line: what is wrong, and what to do."""


class VerificationError(UserError):
    """The artifact does not compute what the original model computes."""
