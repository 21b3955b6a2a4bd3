"""Training loaders that do not tell their length, and schedules that never come due."""

import warnings

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, IterableDataset

from chanaxes_pl import AxisTracker, read_run
from tests.helpers.training import QUIET, STEPS, build, images, loaders, trainer
from tests.tracking.test_tracker import measured

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]


class Stream(IterableDataset):
    """Images whose number nobody knows before; longer from pass to pass, or without an end."""

    def __init__(self, *counts: int, endless: bool = False):
        self.counts, self.endless, self.passes = counts, endless, 0

    def __iter__(self):
        self.passes += 1
        while True:
            yield from images(self.counts[min(self.passes, len(self.counts)) - 1], 1)
            if not self.endless:
                return


def epochs(root, stream, **settings) -> list[float]:
    tracker = AxisTracker(schedule="1 steps")
    trainer(root, tracker, **settings).fit(build(), DataLoader(stream, batch_size=8), loaders()["val_dataloaders"])
    return read_run(tracker.folder)["epoch"].unique().tolist()


def test_of_a_stream_the_first_epoch_is_bounded_and_the_next_is_as_long(tmp_path):
    found = epochs(tmp_path, Stream(24))
    assert found == pytest.approx([0, 1 / 1001, 1 - (1000 / 1001) ** 2, 1, 1 + 1 / 3, 1 + 2 / 3, 2])


def test_a_stream_that_grows_keeps_to_its_epoch(tmp_path):
    found = epochs(tmp_path, Stream(16, 40))
    assert found == pytest.approx([0, 1 / 1001, 1, 1.5, 1 + 2 / 3, 1.75, 1.8, 2])


@pytest.mark.parametrize(("accumulate", "expected"), [(1, [0, 0.2, 0.4, 0.6, 0.8, 5 / 6]), (2, [0, 0.2, 0.4, 0.6])])
def test_of_an_endless_stream_the_epoch_is_the_share_of_the_steps_at_most(tmp_path, accumulate, expected):
    steps = len(expected) - 1
    settings = {"max_epochs": -1, "max_steps": 5, "accumulate_grad_batches": accumulate}
    found = epochs(tmp_path, Stream(24, endless=True), **settings)
    assert found[: steps + 1] == pytest.approx(expected)
    assert len(found) == 6
    assert max(found) < 1


def test_a_stream_of_limited_batches_has_the_fractions_of_a_loader(tmp_path):
    assert epochs(tmp_path, Stream(24), limit_train_batches=2) == [0, 0.5, 1, 1.5, 2]


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")
@pytest.mark.parametrize("where", ["first", "second"])
def test_a_resumed_stream_goes_on_in_time(tmp_path, where):
    """Interrupted in mid-epoch; the second epoch's length is known from the first, also after resuming."""
    steps = {"first": 2, "second": 5}[where]
    saver = ModelCheckpoint(tmp_path / "saved", save_last=True, every_n_train_steps=1)
    data = DataLoader(Stream(24), batch_size=8)
    stop = trainer(tmp_path, AxisTracker(schedule="1 steps"), saver, max_epochs=2, max_steps=steps)
    stop.fit(build(), data, loaders()["val_dataloaders"])
    tracker = AxisTracker(schedule="1 steps")
    trainer(tmp_path, tracker, max_epochs=3).fit(
        build(), data, loaders()["val_dataloaders"], ckpt_path=tmp_path / "saved/last.ckpt", weights_only=True
    )
    found = read_run(tracker.folder)[["step", "epoch"]].drop_duplicates()
    assert found["step"].is_monotonic_increasing
    assert found["epoch"].is_monotonic_increasing
    assert found["epoch"].is_unique
    assert found["epoch"].iloc[-1] == 3


# --- schedules that never come due ----------------------------------------------------------------------------------

NEVER = r"AxisTracker\(schedule={}\) came due at no step of {} after initialisation, so the trained network was meas"


@pytest.mark.parametrize(
    ("schedule", "quoted"), [("epoch", "'epoch'"), ([50], r"\[50\]"), (3, "3"), ("9 steps", "'9 steps'")]
)
def test_a_schedule_that_never_came_due_is_told_with_the_cure_and_the_end_is_measured(tmp_path, schedule, quoted):
    tracker = AxisTracker(schedule=schedule)
    fitter = trainer(tmp_path, tracker, max_epochs=-1, max_steps=5)
    stream = DataLoader(Stream(24, endless=True), batch_size=8)
    with pytest.warns(UserWarning, match=f"{NEVER.format(quoted, 5)}.*such as schedule='1 steps'"):
        fitter.fit(build(), stream, loaders()["val_dataloaders"])
    assert measured(tracker.folder) == [(0, 0), (5 / 6, 5)]


@pytest.mark.parametrize("schedule", [[], [0]])
def test_who_asks_for_initialisation_alone_gets_no_more(tmp_path, schedule):
    tracker = AxisTracker(schedule=schedule)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*workers|Found 1 module|.*LeafSpec")
        trainer(tmp_path, tracker).fit(build(), **loaders())
    assert measured(tracker.folder) == [(0, 0)]


def test_a_fast_development_run_does_not_complain_of_the_schedule(tmp_path):
    tracker = AxisTracker(schedule=[50])
    trainer(tmp_path, tracker, fast_dev_run=True).fit(build(), **loaders())
    assert tracker.correlations["step"].unique().tolist() == [0, 1]


def test_a_schedule_that_came_due_is_left_alone(tmp_path):
    tracker = AxisTracker(schedule=[STEPS])
    trainer(tmp_path, tracker).fit(build(), **loaders())
    assert measured(tracker.folder) == [(0, 0), (1, STEPS)]
