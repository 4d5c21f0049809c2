"""The teacher cache: the same student as without it, interrupted, shared, and refused when it is stale."""

import json
import pickle
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pytorch_lightning import LightningDataModule
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lit_compress import ranks
from lit_compress.cli import main
from lit_compress.datamodules import DigitsDataModule, TeacherCacheDataModule
from lit_compress.losses import AttentionTransfer, CrossEntropy, KnowledgeDistillation, TeacherConfidence
from lit_compress.models import LeNet300100
from lit_compress.modules import LitClassifier, LitDistiller
from lit_compress.teacher import Teacher
from lit_compress.teacher_cache import SeededSamples, TeacherCache
from tests.modules import new_trainer, same
from tests.test_docs import ROOT

COUNT = 100


class Crops(Dataset):
    """Images moved at random by all three generators."""

    def __init__(self, shift=0.0, changed=None, wild=False):
        self.images = torch.randn(COUNT, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        if changed is not None:
            self.images[changed] += 1
        self.shift, self.own = shift, random.Random(1) if wild else None

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        rows, columns = int(torch.randint(3, ())), int(np.random.randint(3))
        moved = self.images[index].roll((rows, columns), (1, 2)) * (self.own or random).uniform(0.5, 1.5)
        return moved + self.shift, index % 5


class CropsModule(LightningDataModule):
    def __init__(self, seeded=None, workers=0, sampler=None, **options):
        super().__init__()
        self.dataset = Crops(**options) if seeded is None else SeededSamples(Crops(**options), **seeded)
        self.workers, self.sampler = workers, sampler

    def train_dataloader(self):
        return DataLoader(self.dataset, 20, shuffle=self.sampler is None, num_workers=self.workers, sampler=self.sampler)


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(108, 4), nn.ReLU(), nn.Dropout(0.0), nn.Linear(4, 5)
    )


def teacher_network(seed=1):
    teacher = network(seed)
    teacher[5].p = 0.5
    return teacher


def terms():
    return [KnowledgeDistillation(), AttentionTransfer(["0"], beta=10)]


def distiller(losses=None, teacher=None):
    return LitDistiller(
        teacher or teacher_network(),
        network(2),
        losses or terms(),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.02),
    )


def fit(folder, module, data, epochs=2, **options):
    torch.manual_seed(7)
    trainer = new_trainer(folder, max_epochs=epochs, **options)
    trainer.fit(module, datamodule=data)
    return {name: value.detach().clone() for name, value in module.student.state_dict().items()}


def forwards(module):
    """Rows that the teacher's first layer sees, as a list that grows."""
    rows = []
    module.teacher.network[0].register_forward_hook(lambda layer, inputs, output: rows.append(len(output)))
    return rows


# ---------------------------------------------------------------- the same training


@pytest.mark.parametrize(("variants", "workers"), [(1, 0), (3, 0), (3, 1)])
def test_a_cached_run_trains_the_same_student(variants, workers, tmp_path):
    seen = {"variants": variants, "seed": 5}
    plain = fit(tmp_path, distiller(), CropsModule(seeded=seen, workers=workers))
    module = distiller()
    rows = forwards(module)
    cached = fit(tmp_path, module, TeacherCacheDataModule(CropsModule(workers=workers), tmp_path / "cache", **seen))
    assert sum(rows) == variants * COUNT + 1  # each variant once, and one sample to learn the shapes
    for name, value in plain.items():
        # The teacher ran on batches of 256 there, of 20 here.
        torch.testing.assert_close(cached[name], value, rtol=1e-4, atol=1e-6)

    again = distiller()
    rows = forwards(again)
    assert same(fit(tmp_path, again, TeacherCacheDataModule(CropsModule(workers=workers), tmp_path / "cache", **seen)), cached)
    assert rows == []


def test_variants_are_drawn_anew_each_time_and_leave_the_random_numbers_alone():
    samples = SeededSamples(Crops(), variants=2)
    both = [torch.stack([sample[0] for sample in samples.at([(index, variant) for index in range(COUNT)])]) for variant in (0, 1)]
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    samples.at([(3, 1)])
    assert same(states, (random.getstate(), np.random.get_state(), torch.get_rng_state()))
    assert torch.equal(SeededSamples(Crops(), variants=2).at([(3, 1)])[0][0], both[1][3])
    assert not torch.equal(SeededSamples(Crops(), variants=2, seed=1).at([(3, 1)])[0][0], both[1][3])
    drawn = torch.zeros(2)
    for _ in range(4):
        for index, (image, _) in enumerate(samples.__getitems__(range(COUNT))):
            which = [torch.equal(image, one[index]) for one in both]
            assert sum(which) == 1
            drawn += torch.tensor(which)
    assert drawn.min() > 150  # of 400; fewer has a chance of 1 in 4 million


def test_confidence_is_cached_as_it_was_read(tmp_path):
    losses = [TeacherConfidence("3", passes=20), CrossEntropy()]
    module = distiller([TeacherConfidence("6", passes=20), CrossEntropy()])
    fit(tmp_path, module, TeacherCacheDataModule(CropsModule(), tmp_path / "cache"), epochs=1)
    samples = SeededSamples(Crops())
    cache = TeacherCache(tmp_path / "cache", module.teacher, samples)
    torch.manual_seed(0)  # of the first and only block
    readings = module.teacher.read(torch.stack([sample[0] for sample in samples.at((index, 0) for index in range(COUNT))]))
    places = [(index, 0) for index in (5, 99)]
    for place, found in zip((5, 99), cache.read(places, [sample[0] for sample in samples.at(places)]), strict=True):
        assert found.keys() == {"mean(6)", "covariance(6)"}
        for name, value in found.items():
            assert torch.equal(value, readings[name][place])
    with pytest.raises(ValueError, match="No dropout layer runs before layer '3'"):
        fit(tmp_path, distiller(losses), TeacherCacheDataModule(CropsModule(), tmp_path / "other"))
    assert not (tmp_path / "other").exists()


# ---------------------------------------------------------------- interrupted, shared


class StopHere(KeyboardInterrupt):
    """In the middle of a block."""


def test_an_interrupted_cache_goes_on_where_it_stopped(tmp_path):
    samples = SeededSamples(Crops())
    whole, broken = Teacher(teacher_network()), Teacher(teacher_network())
    complete = TeacherCache(tmp_path / "whole", whole, samples, block=16)
    complete.fill(whole, torch.device("cpu"))

    cache = TeacherCache(tmp_path / "cache", broken, samples, block=16)
    read, blocks = broken.read, []

    def read_some(inputs):
        if len(blocks) == 4:
            raise StopHere
        blocks.append(len(inputs))
        return read(inputs)

    broken.read = read_some
    with pytest.raises(StopHere):
        cache.fill(broken, torch.device("cpu"))
    place = [(99, 0)]
    with pytest.raises(ValueError, match="is not filled as far as sample 99"):
        cache.read(place, [samples.at(place)[0][0]])
    blocks[:] = []
    again = TeacherCache(tmp_path / "cache", broken, samples)
    assert again.missing() == [4, 5, 6]
    again.fill(broken, torch.device("cpu"))
    assert blocks == [16, 16, 4]
    for file in (tmp_path / "whole").glob("*.npy"):
        assert np.array_equal(np.load(file), np.load(tmp_path / "cache" / file.name)), file.name


def test_a_cache_in_another_process_maps_the_files_itself(tmp_path):
    samples, teacher = SeededSamples(Crops()), Teacher(teacher_network())
    cache = TeacherCache(tmp_path / "cache", teacher, samples)
    cache.fill(teacher, torch.device("cpu"))
    place = [(3, 0)]
    inputs = [samples.at(place)[0][0]]
    before = len(pickle.dumps(samples))
    found = cache.read(place, inputs)
    assert len(pickle.dumps(cache)) < before + 2_000  # the readings alone are 2 kB: 100 rows of 5 floats
    assert same(pickle.loads(pickle.dumps(cache)).read(place, inputs), found)


def fill_on_ranks(folder):
    size = ranks.world_size()
    several = {"strategy": "ddp", "devices": size} if size > 1 else {}
    order = DistributedSampler(Crops(), size, ranks.rank(), shuffle=False)
    module = distiller()
    rows = forwards(module)
    data = TeacherCacheDataModule(CropsModule(sampler=order), folder / "cache", variants=6)
    student = fit(folder, module, data, epochs=1, **several)
    return sum(rows), student


def test_two_processes_fill_one_cache(processes, tmp_path):
    fill_on_ranks(tmp_path / "one")
    found = processes(2)(fill_on_ranks, tmp_path / "two")
    # 600 rows are blocks of 256, 256 and 88; the first rank also runs one sample to learn the shapes.
    assert [rows for rows, _ in found] == [256 + 88 + 1, 256]
    assert same(found[0][1], found[1][1])
    for file in (tmp_path / "one" / "cache").glob("*.npy"):
        assert np.array_equal(np.load(file), np.load(tmp_path / "two" / "cache" / file.name)), file.name


# ---------------------------------------------------------------- stale


def other_teacher():
    teacher = teacher_network()
    with torch.no_grad():
        teacher[6].bias[0] += 1e-4
    return teacher


@pytest.mark.parametrize(
    ("module", "data", "options", "what"),
    [
        (lambda: distiller(teacher=other_teacher()), {}, {}, "teacher"),
        (lambda: distiller([KnowledgeDistillation()]), {}, {}, "readings"),
        (distiller, {"shift": 0.1}, {}, "data"),
        (distiller, {"changed": 0}, {}, "data"),
        (distiller, {}, {"seed": 1}, "data"),
        (distiller, {}, {"variants": 2}, "data"),
    ],
    ids=["weights", "readings", "transform", "image", "seed", "variants"],
)
def test_a_stale_cache_is_refused_by_name(module, data, options, what, tmp_path):
    fit(tmp_path, distiller(), TeacherCacheDataModule(CropsModule(), tmp_path / "cache"), epochs=1)
    with pytest.raises(ValueError, match=f"cache is stale: its {what} was .* Remove the folder"):
        fit(tmp_path, module(), TeacherCacheDataModule(CropsModule(**data), tmp_path / "cache", **options))


def test_a_change_that_the_fingerprint_does_not_see_is_noticed_when_it_is_read(tmp_path):
    fit(tmp_path, distiller(), TeacherCacheDataModule(CropsModule(), tmp_path / "cache"), epochs=1)
    probed = set(np.linspace(0, COUNT - 1, 64).astype(int).tolist())
    hidden = next(index for index in range(COUNT) if index not in probed)
    with pytest.raises(ValueError, match=f"Sample {hidden}, variant 0, is not what the teacher saw"):
        fit(tmp_path, distiller(), TeacherCacheDataModule(CropsModule(changed=hidden), tmp_path / "cache"))


def test_an_augmentation_with_a_generator_of_its_own_is_noticed(tmp_path):
    with pytest.raises(ValueError, match=r"is stale: its data was|draws from a generator of its own"):
        fit(tmp_path, distiller(), TeacherCacheDataModule(CropsModule(wild=True), tmp_path / "cache"))


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds files, but no teacher cache"):
        fit(tmp_path, distiller(), TeacherCacheDataModule(CropsModule(), tmp_path / "cache"))
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["thesis.txt"]


def test_a_disk_without_room_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match=r"would take .* GB, for 100 samples"):
        TeacherCache(tmp_path / "cache", Teacher(teacher_network()), SeededSamples(Crops()))
    assert not list(tmp_path.iterdir())


def test_a_later_format_is_refused(tmp_path):
    teacher, samples = Teacher(teacher_network()), SeededSamples(Crops())
    TeacherCache(tmp_path / "cache", teacher, samples)
    file = tmp_path / "cache" / "cache.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 99}))
    with pytest.raises(ValueError, match="its format was 99 and is now 1"):
        TeacherCache(tmp_path / "cache", teacher, samples)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda folder: TeacherCacheDataModule(CropsModule(), folder, variants=0), "`variants` must be at least 1 but got 0"),
        (lambda folder: TeacherCacheDataModule(CropsModule(), folder, seed=-1), "`seed` must be at least 0 but got -1"),
        (lambda folder: TeacherCacheDataModule(CropsModule(), folder).train_dataloader(), r"is filled in `setup\('fit'\)`"),
        (lambda folder: SeededSamples(iter([1])), "has no length"),
        (lambda folder: SeededSamples([("text", 1)]).fingerprint, "with a tensor of inputs but got a str"),
        (lambda folder: TeacherCache(folder, Teacher(network(1)), SeededSamples(Crops()), block=0), "`block` must be at least 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_says_what_is_wrong(make, text, tmp_path):
    with pytest.raises(ValueError, match=text):
        make(tmp_path / "cache")


def test_only_a_distiller_has_a_teacher_to_cache(tmp_path):
    trainer = new_trainer(tmp_path, max_epochs=1)
    data = TeacherCacheDataModule(DigitsDataModule(), tmp_path / "cache")
    with pytest.raises(ValueError, match="belongs to a Trainer that fits a `LitDistiller`"):
        trainer.fit(LitClassifier(LeNet300100(in_features=64), num_classes=10), datamodule=data)


# ---------------------------------------------------------------- from the command line


def test_the_digits_configs_train_a_teacher_and_a_student_from_its_cache(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    short = ["--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false"]
    main(["fit", "--config", str(ROOT / "configs" / "teacher_digits.yaml"), *short])
    main(["fit", "--config", str(ROOT / "configs" / "distill_digits.yaml"), *short])
    about = json.loads((tmp_path / "lit_compress_runs" / "teacher_digits" / "cache" / "cache.json").read_text())
    assert about["readings"] == ["", "features.relu2", "features.relu5", ""]
    (figures,) = (tmp_path / "lit_compress_runs" / "distill_digits").rglob("metrics.csv")
    assert {"train/knowledge_distillation", "train/attention_transfer/features.relu2"} <= set(
        figures.read_text().splitlines()[0].split(",")
    )
    (checkpoint,) = (tmp_path / "lit_compress_runs" / "distill_digits").rglob("*.ckpt")
    main(["test", "--config", str(ROOT / "configs" / "distill_digits.yaml"), *short, "--ckpt_path", str(checkpoint)])
    assert "test/accuracy" in capsys.readouterr().out
