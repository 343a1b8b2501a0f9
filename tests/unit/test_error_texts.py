"""The table of known errors against texts of real reports, in the forms in which logs hold them."""

import json
import random
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from app.known_errors.diagnose import diagnose
from app.known_errors.logtext import plain

TEXTS = Path(__file__).parents[1] / "errors"
HARMLESS = (TEXTS / "harmless.txt").read_text(encoding="utf-8").splitlines()
NAMES = ("reported", "collected", "threads")
SETS = {name: (TEXTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines() for name in NAMES}
OPEN_FILES = "RuntimeError: Too many open files. Communication with the workers is no longer possible."


def _recall(rows: Sequence[str]) -> tuple[float, float]:
    """Shares of texts that are named right, and wrong."""
    right = wrong = 0
    for row in map(json.loads, rows):
        found = diagnose(row["text"])
        named = found.error.id if found and found.error.rank > 0 else ""
        # Some have no cause to be named: what stands beside an error.
        if (found.error.id if found else "") in row["ids"] or not (named or row["ids"]):
            right += 1
        elif named:
            wrong += 1
    return right / len(rows), wrong / len(rows)


@pytest.mark.parametrize("name", SETS)
def test_texts_of_real_reports_are_named_right_and_hardly_any_wrong(name: str) -> None:
    right, wrong = _recall(SETS[name])
    assert right >= 0.95
    assert wrong <= 0.02


@pytest.mark.parametrize("line", HARMLESS)
def test_what_healthy_jobs_print_is_no_known_error(line: str) -> None:
    assert diagnose(line) is None


def test_a_log_of_nothing_but_harmless_lines_is_no_known_error_in_whatever_order() -> None:
    assert len(HARMLESS) >= 100
    lines = [*HARMLESS, ""]
    for seed in range(20):
        random.Random(seed).shuffle(lines)
        assert diagnose("\n".join(lines)) is None


def _wrapped(width: int) -> Callable[[str], str]:
    return lambda text: "\n".join(text[start : start + width] for start in range(0, len(text), width))


FORMS: dict[str, Callable[[str], str]] = {
    "as it is": str,
    "wrapped between words": lambda text: "\n    ".join(textwrap.wrap(text, 50)),
    "wrapped by a terminal of 80 columns": _wrapped(80),
    "wrapped by a terminal of 37 columns": _wrapped(37),
    "torchrun's prefix": lambda text: f"[rank1]: {text}",
    "torch's elastic prefix": lambda text: f"[default1]:[rank1]: {text}",
    "this project's prefix": lambda text: f"[rank 1] {text}",
    "compose": lambda text: f"trainer-1  | {text}",
    "slurm": lambda text: f"1: {text}",
    "mpirun": lambda text: f"[1,0]<stderr>:{text}",
    "ray": lambda text: f"(RayTrainWorker pid=123, ip=10.0.0.2) {text}",
    "kubernetes": lambda text: f"2026-11-27T00:12:01.123456789Z stderr F {text}",
    "a time in brackets": lambda text: f"[2026-11-27 00:12:01,123] {text}",
    "coloured": lambda text: f"\x1b[1;31m{text[:20]}\x1b[0m\x1b[38;5;9m{text[20:]}\x1b[0m",
    "carriage returns": lambda text: f"step 1\rstep 2\r{text}\r\nmore\r\n",
    "docker's json-file": lambda text: json.dumps({"log": f"{text}\n", "stream": "stderr", "time": "2026-11-27"}),
    "structured": lambda text: json.dumps({"level": "error", "msg": text, "ts": 1.5}),
    "an exception in a record": lambda text: json.dumps({"record": {"message": "failed", "exception": f"T:\n{text}"}}),
}
FORMED = (
    # Known only at the beginning of a line.
    ("host-memory", "MemoryError"),
    ("open-files", OPEN_FILES),
    ("gpu-no-driver", "RuntimeError: Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU"),
    (
        "gloo-peer-closed",
        "RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.2]:39558",
    ),
    (
        "nccl-duplicate-gpu",
        "node1:2203:2203 [0] init.cc:904 NCCL WARN Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 60",
    ),
)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("entry", "text"), FORMED, ids=[entry for entry, _ in FORMED])
def test_an_error_is_known_in_whatever_form_a_log_holds_it(entry: str, text: str, form: str) -> None:
    found = diagnose(f"step 1\n{FORMS[form](text)}\nstep 2\n")
    assert found is not None
    assert found.error.id == entry


@pytest.mark.parametrize("form", FORMS)
def test_a_log_keeps_its_lines_whatever_its_form(form: str) -> None:
    log = f"step 1\n{FORMS[form](OPEN_FILES)}\nstep 2\n"
    assert plain(log).count("\n") == log.count("\n")


@pytest.mark.parametrize("form", ["as it is", "wrapped by a terminal of 37 columns", "coloured", "docker's json-file"])
def test_the_number_of_the_line_is_that_of_the_file(form: str) -> None:
    found = diagnose("step\n" * 41 + FORMS[form](OPEN_FILES) + "\nstep\n" * 7)
    assert found is not None
    assert found.number == 42


@pytest.mark.parametrize(
    "line",
    [
        "[default0]:step 120  loss 2.31  52000 tokens/s  Error rate 0.1, connection fine, CUDA ok",
        '{"level": "info", "msg": "step 120 error connection failed NCCL CUDA", "ts": 1.5}',
        "\x1b[32mtrainer-1  | \x1b[0m[rank0]: step 120 RuntimeError NCCL WARN error failed to connect",
    ],
)
def test_megabytes_without_an_error_are_read_in_bounded_time(line: str) -> None:
    text = f"{line}\n" * (5_000_000 // len(line))
    started = time.process_time()
    assert diagnose(text) is None
    assert time.process_time() - started < 8


@pytest.mark.parametrize("letter", ["a", " ", "[", "{", "\x1b[", "1:", "[rank0]: ", "Error: "])
def test_one_line_of_a_megabyte_is_read_in_bounded_time(letter: str) -> None:
    started = time.process_time()
    assert diagnose(letter * (1_000_000 // len(letter))) is None
    assert time.process_time() - started < 4
