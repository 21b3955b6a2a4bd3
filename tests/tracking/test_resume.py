"""A resumed run measures what it did before, or says what differs."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import TensorDataset

from chanaxes_pl import AxisTracker, read_run
from chanaxes_pl.network.probe import Probe
from chanaxes_pl.network.recording import Settings
from chanaxes_pl.tracking.resume import fingerprint
from tests.helpers.training import QUIET, STEPS, build, images, loaders, trainer
from tests.tracking.test_tracker_errors import Stream
from tests.tracking.test_tracker_invariants import fit

pytestmark = [
    *(pytest.mark.filterwarnings(text) for text in QUIET),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided"),
]


def margin(logits, labels):
    return logits[:, 0]


def relabelled() -> TensorDataset:
    pictures, labels = images()[:]
    return TensorDataset(pictures, labels.flip(0))


CURE = r"\. Resume with the same settings and probe, or track under another name= to begin a new table"


@pytest.mark.parametrize(
    ("other", "differs"),
    [
        ({"target": "label"}, "target: 'auto', now 'label'"),
        ({"target": margin}, "target: 'auto', now 'margin'"),
        ({"positions": 4}, "positions: 16, now 4"),
        ({"positions": "all"}, "positions: 16, now 'all'"),
        ({"noise": 0.5}, "noise: 'median', now 0.5"),
        ({"alignment": True}, "alignment: False, now True"),
        ({"reliability": False}, "reliability: True, now False"),
        ({"probe_size": 20}, "probe_size: 5000, now 20; images in the probe: 40, now 20; labels of the probe: '.*', "),
        ({"probe": images(30)}, "images in the probe: 40, now 30"),
        ({"probe": relabelled()}, "labels of the probe: '[0-9a-f]{12}', now '[0-9a-f]{12}'"),
        ({"step": lambda module, batch: (module(batch[0]), batch[1])}, "step: None, now '<lambda>'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_measurement_is_refused_with_what_differs(tmp_path, other, differs):
    folder = fit(tmp_path).folder
    saved = tmp_path / "saved" / f"step={STEPS}.ckpt"
    with pytest.raises(ValueError, match=rf"AxisTracker measured something else.*: {differs}.*{CURE}"):
        fit(tmp_path, 4, saved, tracker=AxisTracker(**other))
    assert read_run(folder)["step"].unique().tolist() == [0, STEPS, 2 * STEPS]
    tracker = AxisTracker(**other, name="other")
    fit(tmp_path, 3, saved, tracker=tracker)
    assert read_run(tracker.folder)["step"].unique().tolist() == [STEPS, 2 * STEPS, 3 * STEPS]


def test_functions_are_told_apart_by_name_and_other_pictures_by_shape(tmp_path):
    def again(logits, labels):
        return logits[:, 0]

    again.__qualname__ = "margin"
    fit(tmp_path, tracker=AxisTracker(target=margin))
    saved = tmp_path / "saved" / f"step={STEPS}.ckpt"
    tracker = fit(tmp_path, 3, saved, tracker=AxisTracker(target=again, probe=images(seed=9)))
    assert read_run(tracker.folder)["step"].unique().tolist() == [0, STEPS, 2 * STEPS, 3 * STEPS]


def test_a_checkpoint_of_a_version_that_kept_no_settings_still_resumes(tmp_path):
    fit(tmp_path)
    path = tmp_path / "saved" / f"step={STEPS}.ckpt"
    saved = torch.load(path, weights_only=True)
    for key in ("fingerprint", "clock"):
        del saved["callbacks"]["AxisTracker(axis)"][key]
    torch.save(saved, path)
    tracker = fit(tmp_path, 3, path, tracker=AxisTracker(positions=4))
    assert read_run(tracker.folder)["step"].unique().tolist() == [0, STEPS, 2 * STEPS, 3 * STEPS]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("step", range(1, STEPS))
def test_a_tracker_that_joins_in_mid_epoch_begins_where_training_does(tmp_path, step):
    saving = ModelCheckpoint(tmp_path / "saved", "{step}", save_top_k=-1, every_n_train_steps=1)
    trainer(tmp_path, saving, max_epochs=1, enable_checkpointing=True).fit(build(), **loaders())
    tracker = AxisTracker()
    trainer(tmp_path, tracker, max_epochs=1).fit(
        build(), **loaders(), ckpt_path=tmp_path / "saved" / f"step={step}.ckpt"
    )
    measured = read_run(tracker.folder).drop_duplicates("step")
    assert measured[["step", "epoch"]].to_numpy().tolist() == [[step, step / STEPS], [STEPS, 1.0]]


def test_a_trainer_that_goes_on_with_another_probe_is_refused_too(tmp_path):
    model, fitter = build(), trainer(tmp_path, AxisTracker(), max_epochs=1)
    fitter.fit(model, **loaders())
    fitter.fit_loop.max_epochs = 2
    with pytest.raises(ValueError, match="images in the probe: 40, now 16"):
        fitter.fit(model, loaders()["train_dataloaders"], torch.utils.data.DataLoader(images(16), batch_size=8))


def test_labels_tell_probes_apart_where_batches_hold_unequal_lists_of_images():
    def listed(items):
        return [image for image, _ in items], torch.tensor([label for _, label in items])

    found = set()
    for shift in range(3):
        labels = (torch.arange(100) + shift) % 4
        data = torch.utils.data.TensorDataset(torch.zeros(100, 3, 4, 4), labels)
        loader = torch.utils.data.DataLoader(data, 24, collate_fn=listed)
        found.add(fingerprint(Settings(), Probe(loader))["labels of the probe"])
    assert len(found) == 3


def test_a_fingerprint_is_plain_and_draws_no_random_number():
    class Draws(torch.utils.data.Dataset):
        def __len__(self):
            return 200

        def __getitem__(self, index):
            return {"image": torch.rand(3, 4, 4), "label": index % 7, "mask": torch.zeros(4, 4, dtype=torch.uint8)}

    state = torch.get_rng_state()
    probes = [Probe(Draws()), Probe(torch.utils.data.DataLoader(Stream(), batch_size=2))]
    found = [[fingerprint(Settings(), probe) for _ in range(2)] for probe in probes]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(first == second for first, second in found)
    assert [first["images in the probe"] for first, _ in found] == [200, "a stream"]
    assert {type(value) for first, _ in found for value in first.values()} <= {str, int, float, bool, type(None)}
