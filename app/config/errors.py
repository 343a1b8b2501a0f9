"""The error that is the user's to mend: it ends the program with one message, without a traceback."""


class UserError(Exception):
    """The user must change something: one short message, no traceback.

    `code` is the exit code, an `ExitCode` of `app.config.exitcodes`; 2 is "wrong settings".
    """

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message)
        self.message = message
        self.code = code


def printable(text: str) -> str:
    """`text` with line ends and control characters spelt out, so that a value cannot look like a message of ours."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
