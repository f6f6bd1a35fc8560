"""A training that was stopped, killed or whose checkpoints are damaged goes on to the same bytes."""

import multiprocessing
import os
import signal

import pytest
from pruner_training import FAST, PRUNER, Source, files, run

from ocvtp.errors import Corrupt, Incompatible
from ocvtp.pruner import PrunerConfig
from ocvtp.pruner.training.run import TrainConfig, train


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ema": 0.9},
        {"behaviour": "reference", "epochs": 2, "steps": None, "eval_every": None, "eval_slots": [4]},
    ],
    ids=["default", "ema", "reference"],
)
def test_stopped_and_resumed_ends_in_the_same_bytes(tmp_path, options):
    pruner = PrunerConfig(**{**PRUNER.to_dict(), "ffn_dropout": 0.1})
    whole, expected = run(tmp_path, "whole", pruner=pruner, **options)
    repeated = run(tmp_path, "again", pruner=pruner, **options)[1]
    assert repeated == expected

    class Killed(BaseException):
        pass

    def kill(done, total, note):
        if done == 3:
            raise Killed

    config = TrainConfig(**{**FAST, **options, "checkpoint_every": 3})
    resume = tmp_path / "resume"
    with pytest.raises(Killed):
        train(pruner, config, Source(), tmp_path / "cut", resume=resume, progress=kill)
    assert not (tmp_path / "cut").exists()
    source = Source()
    metrics = train(pruner, config, source, tmp_path / "cut", resume=resume)
    assert metrics == whole
    assert files(tmp_path / "cut") == expected
    assert metrics["steps"] >= 6

    # Once finished, nothing is computed again.
    done = Source()
    assert train(pruner, config, done, tmp_path / "more", resume=resume) == whole
    assert files(tmp_path / "more") == expected
    assert len(done.asked) == 1


def train_to_be_killed(place):
    """Train, and be killed between two checkpoints."""

    def kill(done, total, note):
        if done == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    config = TrainConfig(**FAST, checkpoint_every=2)
    train(PRUNER, config, Source(), place / "out", resume=place / "resume", progress=kill)


def test_killed_for_real(tmp_path):
    """SIGKILL of a process between two checkpoints; another one goes on."""
    # No fork: autograd refuses to run in one if a test before has started its threads.
    child = multiprocessing.get_context("spawn").Process(target=train_to_be_killed, args=(tmp_path,))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "resume/step-00000002.json").exists()
    train(PRUNER, TrainConfig(**FAST, checkpoint_every=2), Source(), tmp_path / "out", resume=tmp_path / "resume")
    assert files(tmp_path / "out") == run(tmp_path, "whole")[1]


def test_damaged_checkpoints(tmp_path):
    config = TrainConfig(**FAST, checkpoint_every=2)
    resume = tmp_path / "resume"
    expected = train(PRUNER, config, Source(), tmp_path / "a", resume=resume)
    names = sorted(p.name for p in resume.iterdir())
    assert names == [f"step-0000000{n}.{kind}" for n in (4, 6) for kind in ("json", "safetensors")]

    last = resume / "step-00000006.safetensors"
    data = bytearray(last.read_bytes())
    data[len(data) // 2] ^= 1  # one flipped bit: back to the one before
    last.write_bytes(data)
    assert train(PRUNER, config, Source(), tmp_path / "b", resume=resume) == expected
    assert files(tmp_path / "a") == files(tmp_path / "b")

    for path in resume.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(Corrupt, match="every checkpoint"):
        train(PRUNER, config, Source(), tmp_path / "c", resume=resume)
    assert not (tmp_path / "c").exists()


def test_checkpoints_of_another_training_are_refused(tmp_path):
    train(PRUNER, TrainConfig(**FAST), Source(), tmp_path / "a", resume=tmp_path / "resume")
    with pytest.raises(Incompatible, match="another training"):
        train(PRUNER, TrainConfig(**FAST, seed=1), Source(), tmp_path / "b", resume=tmp_path / "resume")


@pytest.mark.parametrize("moment", [1, 4, 5])
def test_stopped_where_it_says_how_far_it_is_it_goes_on_from_that_very_step(tmp_path, moment):
    """As by Ctrl-C, or by a cluster that wants its machine back: between two checkpoints, too."""
    said = []

    def progress(done, total, note):
        said.append(done)
        if len(said) == moment:
            raise KeyboardInterrupt

    _, expected = run(tmp_path, "calm", checkpoint_every=3)
    config = TrainConfig(**{**FAST, "checkpoint_every": 3})
    for attempt in range(2):
        try:
            train(PRUNER, config, Source(), tmp_path / "out", resume=tmp_path / "resume", progress=progress)
        except KeyboardInterrupt:
            assert attempt == 0
    assert said == list(range(1, 7))  # every step once
    assert files(tmp_path / "out") == expected
