"""The table of known errors: every entry finds its own text, and nothing harmless is taken for an error."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from app.config.exitcodes import ExitCode
from app.known_errors.catalog import LAYERS, KnownError, all_errors
from app.known_errors.consequences import is_consequence
from app.known_errors.diagnose import diagnose
from app.known_errors.pages import pages
from app.train.loop import LOST

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def by_id(error: KnownError) -> str:
    return error.id


@pytest.mark.parametrize("error", all_errors(), ids=by_id)
def test_each_sample_is_diagnosed_as_its_own_entry(error: KnownError) -> None:
    found = diagnose(error.sample)
    assert found is not None
    assert found.error.id == error.id


@pytest.mark.parametrize("error", all_errors(), ids=by_id)
def test_each_alternative_text_of_an_entry_leads_to_it_or_to_a_more_specific_one(error: KnownError) -> None:
    for text in error.match:
        found = diagnose(f"[rank1]: {text.replace('...', ' 17 ').removeprefix('^')} and more")
        assert found is not None, text
        assert found.error.id == error.id or found.error.rank > error.rank, (text, found.error.id)


ORDINARY = (
    "cache: system not yet initialized, waiting",
    "worker 3 has already checked in, skipping",
    "mismatch in info from procs table, refreshed",
    "benchmark of the exec format error handler",
    "the GPU is lost. in translation: sentence 17",
    "calendar: async fatal event handler registered",
    "GID table changed its width to 80 columns",
    "ValueError: invalid literal for int() with base 10: ''",
    "retry on MemoryError is on",
    "the dataset's manifest unknown, indexing anew",
    "Stale file handle cache dropped",
    "tqdm can't start new thread, no progress bar",
    "Connect timeout [s]: 30",
    "backoff exceeded error retry count after 3 tries, next mirror",
    "Could not find real path of the tokenizer, using its name",
    "Could not load dynamic library 'libcuda.so.1'; dlerror: libcuda.so.1: cannot open shared object file",
    "No CUDA GPUs are available, using the CPU",
    "Torch not compiled with CUDA enabled: falling back to float32",
    "epoch 1 was ended by the scheduler",
)


@pytest.mark.parametrize("text", ORDINARY)
def test_what_an_ordinary_program_prints_names_no_cause(text: str) -> None:
    found = diagnose(f"step 1\n[default0]:{text}\nstep 2\n")
    assert found is None or found.error.rank < 3


@pytest.mark.parametrize("text", ["MemoryError", "MemoryError: ", "[rank1]: MemoryError", "[default0]:MemoryError"])
def test_an_entry_that_begins_with_a_caret_is_found_at_the_beginning_of_a_line(text: str) -> None:
    found = diagnose(f"Traceback\n{text}\n")
    assert found is not None
    assert found.error.id == "host-memory"


@pytest.mark.parametrize("consequence", [error for error in all_errors() if error.rank < 2], ids=by_id)
def test_a_consequence_loses_against_any_cause_wherever_it_stands(consequence: KnownError) -> None:
    for cause in all_errors():
        if cause.rank < 2:
            continue
        found = diagnose(f"{consequence.sample}\n{cause.sample}\n{consequence.sample}")
        assert found is not None
        assert found.error.id == cause.id


def test_a_worker_killed_for_memory_is_the_cause_and_its_peers_complaint_is_not() -> None:
    log = """
[default0]:RuntimeError: [gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.2]:39558. This is typically
caused by a remote worker crashing. Check the logs of the remote worker before reporting an error. GLHF!
  exitcode  : 1 (pid: 6477)
  exitcode  : -9 (pid: 6478)  (SIGKILL)
torch.distributed.elastic.multiprocessing.api.SignalException: Process 6531 got signal: 15
"""
    found = diagnose(log)
    assert found is not None
    assert found.error.id == "killed-9"
    assert found.line == "exitcode  : -9 (pid: 6478)  (SIGKILL)"


def test_among_equals_the_earliest_is_the_diagnosis() -> None:
    first, second = "ModuleNotFoundError: No module named 'einops'", "OSError: [Errno 28] No space left on device"
    assert [found.error.id for text in (f"{first}\n{second}", f"{second}\n{first}") if (found := diagnose(text))] == [
        "package-missing",
        "disk-full",
    ]


def test_the_diagnosis_carries_the_line_that_gave_it_away() -> None:
    found = diagnose("step 1\n[default1]:ModuleNotFoundError: No module named 'einops'\nmore")
    assert found is not None
    assert found.line == "ModuleNotFoundError: No module named 'einops'"
    assert found.number == 2


def test_a_known_text_is_found_across_the_line_break_of_a_wrapped_message() -> None:
    found = diagnose("RuntimeError: Found no NVIDIA driver on\n    your system.")
    assert found is not None
    assert found.error.id == "gpu-no-driver"


def test_the_table_has_sixty_entries_and_each_is_complete_and_unique() -> None:
    errors = all_errors()
    assert len(errors) >= 60
    assert len({error.id for error in errors}) == len(errors)
    for error in errors:
        assert 0 <= error.rank <= 4, error.id
        assert all((error.match, error.sample, error.cause, error.fix, error.source)), error.id
        assert re.fullmatch(r"[a-z0-9-]+", error.id), error.id
        assert error.layer in LAYERS


def test_the_samples_carry_no_path_of_the_machine_they_were_made_on() -> None:
    assert not [error.id for error in all_errors() if re.search(r"/(root|work|tmp/sym)/", error.sample)]


def test_the_pages_hold_the_table_as_it_is_now() -> None:
    written = {page.name: page.read_text(encoding="utf-8") for page in (DOCS / "errors").iterdir()}
    assert written == pages(), "run: python -m app.known_errors docs/errors"


def test_the_pages_of_errors_are_written_by_the_module(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "app.known_errors", str(tmp_path)], cwd=ROOT, check=True)
    assert {page.name: page.read_text(encoding="utf-8") for page in tmp_path.iterdir()} == pages()


def test_the_first_steps_explain_every_exit_code_of_ours() -> None:
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    assert [code.name for code in ExitCode if f"\n| {code.value} | " not in page] == []


ALONE = [error for error in all_errors() if error.rank == 1 or error.peer]


@pytest.mark.parametrize("error", ALONE, ids=by_id)
def test_what_ranks_print_whose_peer_has_gone_is_a_consequence(error: KnownError) -> None:
    assert is_consequence(error.sample)
    assert is_consequence(f"RuntimeError: {error.sample.splitlines()[0]}") or len(error.sample.splitlines()) > 1


@pytest.mark.parametrize("words", LOST)
def test_the_shipped_script_and_the_table_agree_on_what_a_lost_peer_leaves(words: str) -> None:
    assert is_consequence(f"RuntimeError: [pair.cc:1] {words} [10.0.0.2]:1")


@pytest.mark.parametrize(
    "text",
    [
        "ValueError: bad batch",
        "torch.distributed.DistNetworkError: The server socket has failed to listen on any local network address. "
        "port: 29400, useIpv6: false, code: -98, name: EADDRINUSE, message: address already in use",
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 22.00 MiB.",
        "RuntimeError: of no table",
        "",
    ],
)
def test_a_ranks_own_error_is_no_consequence(text: str) -> None:
    assert not is_consequence(text)
