"""A log of any tool as the texts of the table know it: without colours, prefixes of ranks and times, or JSON around."""

import json
import re

ANSI = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|\][^\x07\n]*\x07)")
PREFIX = re.compile(
    r"""(?mx) ^ (?: (?:
        \[(?:rank\ ?|default|[0-9]+,)?[0-9]+\](?:<std\w+>)?:?          # [rank 0] [rank0]: [default0]: [1,0]<stderr>:
      | [\w.-]+[-_][0-9]+[ ]*\|                                        # trainer-1  |
      | [0-9]+:(?=[ ])                                                 # srun --label
      | \([\w.:-]+[ ](?:pid|ip)=[^()\n]*\)                             # Ray
      | \[?[0-9]{4}[-/][0-9]{2}[-/][0-9]{2}[T ][0-9:]{5,8}(?:[.,][0-9]+)?(?:Z|[+-][0-9:]{4,6})?[]:]?   # a time
      | \[?[0-9]{2}:[0-9]{2}:[0-9]{2}(?:[.,][0-9]+)?\]?
      | std(?:out|err)[ ][FP](?=[ ])                                   # Kubernetes
      | torchrun-compose:
    ) [ \t]* ){1,6}"""
)
JSON_LINE = re.compile(r"(?m)^[ \t]*\{.*\}[ \t]*$")
JSON_FIELDS = ("log", "message", "msg", "text", "event", "error", "exception", "exc_info", "stack", "traceback")
LINE_IN_LINE = "\v"
"""Ends a line that is part of one line of the file, so that lines keep their numbers."""


def plain(log: str) -> str:
    """`log` with as many lines as before."""
    text = log.replace("\r\n", "\n").replace("\r", LINE_IN_LINE)
    if "\x1b" in text:
        text = ANSI.sub("", text)
    text = PREFIX.sub("", text)
    return PREFIX.sub("", JSON_LINE.sub(_told, text)) if "{" in text else text


def _told(line: re.Match[str]) -> str:
    """What a line of JSON says: its texts, without the names of its fields."""
    try:
        fields = json.loads(line[0])
    except ValueError:
        return line[0]
    if str(fields.get("level")).lower() in ("debug", "trace"):
        return ""
    nested = {**fields, **inner} if isinstance(inner := fields.get("record"), dict) else fields
    texts = [value for name in JSON_FIELDS if isinstance(value := nested.get(name), str)]
    return LINE_IN_LINE.join(each.rstrip("\n").replace("\n", LINE_IN_LINE) for each in texts) or line[0]


def line_at(text: str, start: int) -> str:
    begin = max(text.rfind("\n", 0, start), text.rfind(LINE_IN_LINE, 0, start)) + 1
    return re.split(r"[\n\v]", text[begin : begin + 4096], maxsplit=1)[0].strip()
