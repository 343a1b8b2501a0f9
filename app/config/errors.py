"""What a user must change: a problem is one sentence about one setting, a UserError ends the program with it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that the user must change before anything can start."""

    setting: str
    """The variable (or fact) it is about, `NODES` for instance."""
    message: str
    """One sentence with the value, where it came from, and the cure."""


class UserError(Exception):
    """The user must change something: one short message, no traceback.

    `code` is the exit code, an `ExitCode` of `app.config.exitcodes`; 2 is "wrong settings".
    """

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message)
        self.message = message
        self.code = code


def refusal(problems: tuple[Problem, ...]) -> UserError:
    """All `problems` as one error, in the order in which they were found, each once."""
    sentences = list(dict.fromkeys(problem.message for problem in problems))
    if len(sentences) == 1:
        return UserError(sentences[0])
    return UserError("\n".join([f"{len(sentences)} settings are wrong:", *(f"  - {text}" for text in sentences)]))


def printable(text: str) -> str:
    """`text` with line ends and control characters spelt out, so that a value cannot look like a message of ours."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
