"""The one exception that means "the user can fix this"."""


class UserError(Exception):
    """Bad input. The message is one line that names the key, file or record and what to do.

    Commands print it as ``error: MESSAGE`` on stderr and exit with code 2.
    """
