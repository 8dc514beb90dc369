"""Training steps that are recorded and replayed. A CPU records nothing: here what was recorded is run again, on the
recorded step's own tensors, which shows that all that a step needs is put in them."""

import pytest
import torch
from shared import CPU, losses, make_data

from tuning.settings.config import TrialConfig
from tuning.training import graphs
from tuning.training.finetune import finetune
from tuning.training.graphs import TIMED, WARM_UP, Replayed
from tuning.training.models import Models


def config(**values):
    given = {"backbone": "test_resnet", "unfreeze_depth": 5, "image_size": 32, "epochs": 3, "batch_size": 4}
    return TrialConfig(**given | values)


def trained(config, device=CPU, models=None, **arguments):
    return list(finetune(config, make_data(count=96), device=device, weights=None, models=models, **arguments))


def pretended(model, replays):
    """What records on CUDA does not run: so neither does this, for the model's tensors."""

    def record(run):
        parameters = [each for each in model.parameters() if each.requires_grad]
        before, random = {name: tensor.clone() for name, tensor in model.state_dict().items()}, torch.get_rng_state()
        result = run()
        gradients = [each.grad for each in parameters]
        model.load_state_dict(before)
        torch.set_rng_state(random)

        def replay():
            replays.append(1)
            for parameter in parameters:
                parameter.grad = None
            result.copy_(run())
            for own, parameter in zip(gradients, parameters, strict=True):
                own.copy_(parameter.grad)
            return result

        return replay

    return record


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"unfreeze_depth": 2, "optimizer": "sgd", "augmentation": "medium"},
        {"augmentation": "light mixup=0.4", "class_weighting": "balanced", "head_dropout": 0.3},
        {"unfreeze_depth": 0, "batch_norm": "frozen"},
    ],
)
def test_replayed_steps_train_the_same(values, monkeypatch):
    known = trained(config(**values))
    models, replays = Models(), []
    network = models.get("test_resnet", classes=2, image_size=32, seed=0, weights=None, device=CPU)
    monkeypatch.setattr(graphs, "record", pretended(network.model, replays))
    monkeypatch.setattr(graphs, "LEAST_GAIN", 0.0)
    found = trained(config(**values), models=models, graphs=True)
    steps = sum(row["images"] // 4 for row, _ in found)
    assert len(replays) == steps - WARM_UP - TIMED > TIMED
    assert losses(found) == losses(known)


class Slower:
    """Passes of steps that take the one or the other time."""

    def __init__(self, as_they_are, replayed, monkeypatch):
        self.times, self.now, self.calls = {False: as_they_are, True: replayed}, 0.0, []
        self.parameter = torch.nn.Parameter(torch.zeros(()))
        monkeypatch.setattr(graphs, "record", lambda run: lambda: self.ran(True))
        monkeypatch.setattr(graphs.time, "perf_counter", lambda: self.now)
        self.replayed = Replayed(lambda batch, targets, size: self.ran(False), [self.parameter], CPU)

    def ran(self, replayed):
        self.calls.append(replayed)
        self.now += self.times[replayed]
        return torch.zeros(())

    def step(self, batch=4, micro_batch=4):
        self.replayed(torch.zeros(batch), [(torch.zeros(batch), None)], micro_batch)


@pytest.mark.parametrize(("as_they_are", "replayed", "kept"), [(2.0, 1.0, True), (1.0, 1.0, False), (1.0, 2.0, False)])
def test_the_faster_way_stays(as_they_are, replayed, kept, monkeypatch):
    passes = Slower(as_they_are, replayed, monkeypatch)
    for _ in range(WARM_UP + 2 * TIMED + 1 + 5):
        passes.step()
    assert passes.calls == [False] * (WARM_UP + TIMED) + [True] * (TIMED + 1) + [kept] * 5


def test_another_batch_runs_as_it_is_and_so_do_those_after_it(monkeypatch):
    passes = Slower(2.0, 1.0, monkeypatch)
    for _ in range(WARM_UP + 2 * TIMED + 1):
        passes.step()
    passes.step(micro_batch=2)
    passes.step()
    assert passes.calls[-3:] == [True, False, False]


def test_steps_that_can_not_be_recorded_run_as_they_are(monkeypatch, capsys):
    known = trained(config())

    def record(run):
        raise RuntimeError("operation not permitted when stream is capturing\nmore lines")

    monkeypatch.setattr(graphs, "record", record)
    assert losses(trained(config(), graphs=True)) == losses(known)
    said = "can't be recorded as a CUDA graph, and run without: RuntimeError: operation not permitted when stream"
    assert said in capsys.readouterr().err


def test_a_recording_that_fails_half_way_leaves_no_gradients(monkeypatch):
    frozen = config(batch_norm="frozen")  # since this one runs what it records, which would change batch norm
    known = trained(frozen)

    def record(run):
        run()
        raise RuntimeError("out of memory")

    monkeypatch.setattr(graphs, "record", record)
    assert losses(trained(frozen, graphs=True)) == losses(known)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_replays_what_it_recorded(monkeypatch, capsys):
    monkeypatch.setattr(graphs, "LEAST_GAIN", 0.0)
    device = torch.device("cuda")
    known, found = trained(config(), device), trained(config(), device, graphs=True)
    assert not capsys.readouterr().err
    for (ours, _), (theirs, _) in zip(found, known, strict=True):
        assert ours["val_loss"] == pytest.approx(theirs["val_loss"], rel=0.02)
