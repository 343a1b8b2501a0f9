"""The training loop: `torchrun ... -m app.train`. Reads downwards: connect, agree, build, resume, step, stop."""

import time
from dataclasses import asdict
from math import ceil, inf, isfinite
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.elastic.multiprocessing.errors import record

from app.train.checkpoint import Checkpoints, State
from app.train.data import Corpus, held_out_batch, load_corpus, training_batch
from app.train.metrics import Clock, SlowRanks, Summary, Window, open_journal, peak_flops, summarize
from app.train.model import GPT, generate
from app.train.parallel import adamw, in_parallel, learning_rate, synchronized, to_device
from app.train.picture import loss_picture
from app.train.ranks import Place, StopRequest, agree, connect, first_line, gathered, leave, lost_contact
from app.train.settings import Settings, UserError, refuse

PROFILED_STEPS = 3


@record
def main(settings: Settings) -> NoReturn:
    """Trains, and ends the process: 0 finished, 1 failed, 2 wrong settings, 128 + n stopped by signal n."""
    run = None
    try:
        run = Run(settings, connect(settings))
        code = run.train()
    except UserError as error:
        code = refuse(error)
    except FloatingPointError as error:
        say(str(error))
        code = 1
    # Here, where `run` still holds the model.
    leave(code)


class Run:
    """One start of a run on this rank."""

    def __init__(self, settings: Settings, place: Place) -> None:
        """Builds everything and resumes from the newest checkpoint.

        Raises:
            UserError: the ranks disagree, or data, folders or checkpoints cannot be used.
        """
        self.settings, self.place = settings, place
        say(str(place))
        self.names: list[str] = gathered(f"rank {place.rank} on {place.node}")
        self.corpus = _agreed_corpus(settings, place)
        self.journal = open_journal(settings.run_dir, say)
        self.checkpoints = Checkpoints(
            settings.checkpoints, keep=settings.keep, sharded=settings.sharding == "fsdp", say=say
        )
        self.clock, self.slow = Clock(place.device), SlowRanks()

        torch.manual_seed(settings.seed)
        shape = {name: getattr(settings, name) for name in ("vocab", "context", "layers", "heads", "width")}
        self.net = GPT(**shape).to(place.device)
        self.bf16 = settings.precision == "bf16" or (
            settings.precision == "auto" and place.device.type == "cuda" and torch.cuda.is_bf16_supported()
        )
        if settings.compile:
            self.net.compile()
        self.model = in_parallel(self.net, settings, place, self.clock, bf16=self.bf16)
        self.optimizer = adamw(self.net, settings)
        self.parameters = [weight for weight in self.net.parameters() if weight.requires_grad]
        self.profiler: torch.profiler.profile | None = None
        self.window = Window()
        self.step = self.position = 0
        self._resume()

    def train(self) -> int:
        """Steps until the end, a signal, or the loss of another rank; returns the exit code.

        Raises:
            FloatingPointError: a loss or a gradient norm is no number.
        """
        try:
            return self._train()
        except Exception as error:
            if self.settings.sharding == "ddp":
                # The save in the background needs no other rank and may be the newest.
                self.checkpoints.wait()
            if not (isinstance(error, RuntimeError) and lost_contact(error)):
                raise
            say(
                f"{self.names[self.place.rank]} has lost another rank at step {self.step}: {first_line(error)}. "
                f"Newest complete checkpoint: {self.checkpoints.newest()}"
            )
            return 1

    def _train(self) -> int:
        settings, stop = self.settings, StopRequest()
        if self.place.world > 2 and settings.sharding == "ddp":
            self._settle_buckets()
        self.window.started = time.perf_counter()
        number = 0
        while self.step < settings.steps and not number:
            self._profile()
            self.take_step()
            number = stop.agreed()
            last = number or self.step == settings.steps
            due = settings.checkpoint_every and self.step % settings.checkpoint_every == 0
            if last or due or self.step % settings.log_every == 0:
                self.report()
            if last or due:
                self.checkpoints.save(self.state(), self.step)
            if settings.eval_every and (self.step % settings.eval_every == 0 or self.step == settings.steps):
                self._evaluate()
            self.checkpoints.poll()
        stop.close()
        return self._end(number)

    def _settle_buckets(self) -> None:
        """One pass that is thrown away. After its first backward DDP lays out its buckets anew, and with more than two
        ranks the sums then round differently: so no step may be the first, or a resume would not repeat the bits.
        """
        for piece in self._pieces():
            self.model(piece[:, :-1], piece[:, 1:]).backward()
        self.optimizer.zero_grad()

    def take_step(self) -> None:
        """One optimizer step over `batch` sequences."""
        settings, place, window = self.settings, self.place, self.window
        began = time.perf_counter()
        # Randomness of a step (a dropout that you may add) depends on the step alone, so that a resume repeats it.
        torch.manual_seed(settings.seed + 1 + self.step * place.world + place.rank)
        pieces = self._pieces()
        window.data_seconds += time.perf_counter() - began

        begin, loss = self.clock.mark(), torch.zeros((), device=place.device)
        tokens = settings.batch * settings.context
        # DDP and FSDP2 average the gradients of the ranks: so scaled, uneven shares give the mean of all tokens.
        scale = place.world / tokens
        for number, piece in enumerate(pieces, start=1):
            with synchronized(self.model, number == len(pieces)), self._autocast():
                part = self.model(piece[:, :-1], piece[:, 1:])
            with synchronized(self.model, number == len(pieces)):
                (part * scale).backward()
            loss += part.detach()
        end = self.clock.mark()
        window.marks.append((begin, self.clock.ready or end, end))

        norm = nn.utils.clip_grad_norm_(self.parameters, settings.clip or inf)
        rate = learning_rate(settings, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step, self.position = self.step + 1, self.position + settings.batch
        window.losses.append(loss / tokens)
        window.norms.append(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        window.rates.append(rate)

    def _pieces(self) -> list[Tensor]:
        """This rank's share of the step, in as many micro-batches on every rank, (sequences, context + 1) each."""
        settings, place = self.settings, self.place
        share = training_batch(
            self.corpus,
            position=self.position,
            count=settings.batch,
            rank=place.rank,
            world=place.world,
            seed=settings.seed,
        )
        count = ceil(ceil(settings.batch / place.world) / settings.micro_batch)
        return [to_device(piece, place.device) for piece in share.tensor_split(count)]

    def report(self) -> None:
        """One line, and one record per step since the last one.

        Raises:
            FloatingPointError: a loss or a gradient norm is no number. It is raised on all ranks, before any save.
        """
        window, self.window = self.window, Window()
        if not window.losses:
            return
        summary = summarize(window, self.clock)
        first = self.step - len(summary.losses) + 1
        for step, (loss, norm) in enumerate(zip(summary.losses, summary.norms, strict=True), start=first):
            if not (isfinite(loss) and isfinite(norm)):
                raise FloatingPointError(
                    f"step {step}: loss {loss}, gradient norm {norm}. Nothing of it was saved; newest checkpoint: "
                    f"{self.checkpoints.newest()}. Lower lr (now {self.settings.lr}) or clip, or look at the data."
                )
        if self.place.rank == 0:
            self._tell_about(summary, first, window.rates)

    def _tell_about(self, summary: Summary, first: int, rates: list[float]) -> None:
        settings, place, steps = self.settings, self.place, len(summary.losses)
        speed = steps * settings.batch * settings.context / summary.seconds
        records: list[dict[str, Any]] = [
            {"step": first + i, "loss": loss, "grad_norm": norm, "lr": rate, "world": place.world}
            for i, (loss, norm, rate) in enumerate(zip(summary.losses, summary.norms, rates, strict=True))
        ]
        records[-1] |= {"time": time.time(), "tokens_per_second": speed}
        mfu = ""
        if peak := peak_flops(place.device_name):
            records[-1]["mfu"] = speed * self.net.flops_per_token() / (peak * place.world)
            mfu = f"  MFU {records[-1]['mfu']:.1%}"
        self.journal.write(records)
        left = int((settings.steps - self.step) * summary.seconds / steps)
        say(
            f"step {self.step}/{settings.steps}  loss {summary.losses[-1]:.4f} nats/token  {speed:,.0f} tokens/s "
            f"({speed / place.world:,.0f} per rank){mfu}  grad norm {summary.norms[-1]:.2f}  lr {rates[-1]:.1e}  "
            f"ETA {left // 60}m{left % 60:02d}s"
        )
        for sentence in self.slow.update(summary.shares, self.names, steps=steps):
            say(sentence)

    def _profile(self) -> None:
        """Traces three steps of every rank, on request."""
        first = self.settings.profile
        if first and self.step + 1 == first:
            self.profiler = torch.profiler.profile()
            self.profiler.start()
        if self.profiler and self.step + 1 == first + PROFILED_STEPS:
            self.profiler.stop()
            self.journal.path.parent.mkdir(exist_ok=True)
            self.profiler.export_chrome_trace(str(self.journal.path.with_name(f"trace-rank-{self.place.rank}.json")))
            self.profiler = None

    @torch.no_grad()
    def _evaluate(self) -> None:
        """Mean loss of held-out text, every rank its share."""
        place, settings = self.place, self.settings
        share = held_out_batch(self.corpus, count=settings.eval_sequences, rank=place.rank, world=place.world)
        sums = torch.zeros(2, dtype=torch.float64)
        count = ceil(ceil(settings.eval_sequences / place.world) / settings.micro_batch)
        for piece in (to_device(piece, place.device) for piece in share.tensor_split(count)):
            with self._autocast():
                loss = self.net(piece[:, :-1], piece[:, 1:])
            sums += torch.tensor([float(loss), piece[:, 1:].numel()], dtype=torch.float64)
        dist.all_reduce(sums)
        if place.rank == 0:
            value = float(sums[0] / sums[1])
            self.journal.write([{"step": self.step, "eval_loss": value}])
            say(f"step {self.step}/{settings.steps}  held-out loss {value:.4f} nats/token")

    def state(self) -> State:
        """What a checkpoint holds. Its tensors are those of the run, not copies."""
        model, optimizer = get_state_dict(self.net, self.optimizer)
        progress = {"step": self.step, "position": self.position, **_order(self.settings, self.corpus)}
        return {"model": model, "optimizer": optimizer, "progress": progress}

    def _resume(self) -> None:
        state = self.state()
        if self.checkpoints.restore(state) is None:
            self._say_once(f"starting at step 0: no complete checkpoint in {self.checkpoints.folder}")
            return
        decay = [group["weight_decay"] for group in self.optimizer.param_groups]
        set_state_dict(self.net, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        for group, value in zip(self.optimizer.param_groups, decay, strict=True):
            group["weight_decay"] = value
        progress = state["progress"]
        self.step, self.position = progress["step"], progress["position"]
        for name, value in _order(self.settings, self.corpus).items():
            if progress[name] != value:
                self._say_once(f"warning: {name} was {progress[name]}, is {value}: the order of the data changes here")
        again = max(self.journal.read(), default=0) - self.step if self.place.rank == 0 else 0
        self._say_once(f"resumed after step {self.step}; {max(0, again)} logged steps are done again")
        # A disk that lacks it gets its copy now, not after the next interval.
        self.checkpoints.save(state, self.step)

    def _end(self, number: int) -> int:
        self.checkpoints.wait()
        self._say_once(f"checkpoint: {self.checkpoints.newest()}")
        saved = any(not error for error in gathered(self.checkpoints.last_error))
        if number:
            self._say_once(f"stopped by signal {number} after step {self.step} of {self.settings.steps}")
        else:
            self._sample()
            self._draw()
            self._say_once(f"finished {self.settings.steps} steps; metrics: {self.journal.path}")
        return 128 + number if number else int(not saved)

    def _sample(self) -> None:
        if not self.settings.sample or self.settings.vocab != 256:
            return
        prompt = torch.tensor(list(b"def "), device=self.place.device)
        with self._autocast():
            text = generate(
                self.net, prompt, count=self.settings.sample, context=self.settings.context, seed=self.settings.seed
            )
        self._say_once("a sample:\n" + bytes(text.tolist()).decode(errors="replace"))

    def _draw(self) -> None:
        records = self.journal.read() if self.place.rank == 0 else {}
        losses = {step: record["loss"] for step, record in records.items() if "loss" in record}
        held_out = {step: record["eval_loss"] for step, record in records.items() if "eval_loss" in record}
        if losses:
            self.journal.keep("loss.png", loss_picture(losses, held_out))

    def _autocast(self) -> torch.autocast:
        enabled = self.bf16 and self.settings.sharding == "ddp"
        return torch.autocast(self.place.device.type, torch.bfloat16, enabled=enabled)

    def _say_once(self, text: str) -> None:
        if self.place.rank == 0:
            say(text)


def say(text: str) -> None:
    """One line of output, written whole so that ranks do not mix theirs."""
    print(f"{text}\n", end="", flush=True)


def _agreed_corpus(settings: Settings, place: Place) -> Corpus:
    corpus, problem = None, ""
    try:
        corpus = load_corpus(settings.data, settings.context)
        if settings.batch < place.world:
            problem = (
                f"batch={settings.batch} is less than one sequence for each of {place.world} ranks: raise TRAIN_BATCH."
            )
    except UserError as error:
        problem = f"{place.node}: {error}"
    agree(problem)
    if corpus is None:
        raise AssertionError("agree() raises when a corpus is missing")
    same = {"corpus": corpus.digest[:16], "torch": torch.__version__, **asdict(settings)}
    for name in ("run_dir", "checkpoint_dir", "data"):
        same.pop(name)
    theirs = gathered(same)[0]
    differing = [
        f"{name} is {value}, on rank 0 it is {theirs[name]}" for name, value in same.items() if theirs[name] != value
    ]
    agree(f"rank {place.rank} on {place.node}: {'; '.join(differing)}. Make them equal." if differing else "")
    return corpus


def _order(settings: Settings, corpus: Corpus) -> dict[str, Any]:
    """What the order of the data depends on."""
    return {"seed": settings.seed, "context": settings.context, "corpus": corpus.digest[:16]}
