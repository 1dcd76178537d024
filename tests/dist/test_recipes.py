"""Every recipe: its published figures compose, and it takes three real steps at a scaled-down size."""

import math
import re
from pathlib import Path

import pytest
import yaml

from cloze import cli
from cloze.errors import UserError
from pretrain.checkpoint.mirror import retention_of
from pretrain.config import Architecture, TrainConfig, total_samples
from pretrain.optim.schedule import learning_rate
from pretrain.phases import phases_of
from tests.support import ROOT, Trainer, make_corpus

RECIPES = sorted(path.stem for path in (ROOT / "conf" / "recipe").glob("*.yaml"))

# global batch, steps or budget hours, peak rate, warm-up share, betas[1], eps, dropout on attention, clip, masked share
FIGURES = {
    "bert_2018": (256, 1_000_000, 1e-4, 0.01, 0.999, 1e-6, 0.1, 1.0, 0.15),
    "lamb_phase1": (65_536, 7_038, 6e-3, 0.2843, 0.999, 1e-6, 0.1, 1.0, 0.15),
    "lamb_phase2": (32_768, 1_563, 4e-3, 0.128, 0.999, 1e-6, 0.1, 1.0, 0.15),
    "budget_24h": (4_096, 24, 1e-3, 0.06, 0.98, 1e-6, 0.1, 0.0, 0.15),
    "mosaic": (4_096, 70_000, 5e-4, 0.06, 0.98, 1e-6, 0.0, 0.0, 0.30),
    "cramming": (8_192, 24, 1e-3, 0.75, 0.98, 1e-12, 0.0, 0.5, 0.25),
    "roberta": (2_048, 125_000, 5e-4, 0.08, 0.98, 1e-6, 0.1, 0.0, 0.15),
    "babylm": (128, 8_700, 2.5e-4, 0.02, 0.999, 1e-6, 0.1, 1.0, 0.15),  # the rules of a challenge, the rest our own
    "fast": (64, 2_000, 4e-3, 0.025, 0.999, 1e-6, 0.0, 1.0, None),  # our own: docs/results.md
    "continue": (256, 20_000, 5e-5, 0.01, 0.999, 1e-6, 0.1, 1.0, None),  # our own
    "modernbert": ([[0, 768], [0.0291, 4608]], 382_700, 8e-4, 0.0017, 0.98, 1e-6, 0.0, 0.0, 0.30),
    "modernbert_long": (576, 52_982, 3e-4, 0.0, 0.98, 1e-6, 0.0, 0.0, 0.30),
    "modernbert_decay": (576, 10_596, 3e-4, 0.0, 0.98, 1e-6, 0.0, 0.0, 0.30),
    "modernbert_phases": ([[0, 768], [0.0291, 4608]], 446_278, 8e-4, 0.0017, 0.98, 1e-6, 0.0, 0.0, 0.30),
    "ettin_17m": ([[0, 768], [0.0735, 4608]], 406_400, 3e-3, 0.0024, 0.98, 1e-6, 0.0, 0.0, 0.30),
    "ettin_32m": ([[0, 768], [0.0588, 4608]], 397_100, 3e-3, 0.0024, 0.98, 1e-6, 0.0, 0.0, 0.30),
    "ettin_68m": ([[0, 768], [0.0441, 4608]], 387_900, 3e-3, 0.0018, 0.98, 1e-6, 0.0, 0.0, 0.30),
    "ettin_150m": ([[0, 768], [0.0294, 4608]], 378_700, 8e-4, 0.0018, 0.98, 1e-6, 0.0, 0.0, 0.30),
    "mmbert": ([[0, 768], [0.0185, 4608]], 590_600, 8e-4, 0.0011, 0.98, 1e-6, 0.0, 0.0, None),
}
MODERN = ("modernbert", "ettin", "mmbert")
DECAYS = {"mosaic": 0.02, "modernbert_long": 0.0333, "modernbert_decay": 0.0333} | {
    name: 0.1 if name in ("ettin_17m", "ettin_32m", "ettin_68m") else 0.0125
    for name in FIGURES
    if name.startswith(MODERN) and name not in ("modernbert_long", "modernbert_decay")
}


def composed(recipe: str, *overrides: str) -> TrainConfig:
    return cli.compose("train", TrainConfig, ["run=r", "data.path=d", "init_from=x", f"recipe={recipe}", *overrides])


def test_every_recipe_is_tested() -> None:
    assert set(FIGURES) == set(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_figures_are_the_published_ones(recipe: str) -> None:
    """After papers and repositories that the recipe names: written down twice, since a slip costs a month of GPUs."""
    config = composed(recipe)
    optim, schedule = config.optim, config.schedule
    found = (
        config.global_batch_size, config.budget.hours or config.steps, optim.lr, schedule.warmup_fraction, optim.beta2,
        optim.eps, config.model.attention_dropout, optim.clip, config.expect.masking_probability,
    )  # fmt: skip
    assert found == FIGURES[recipe]
    assert optim.beta1 == 0.9
    assert optim.weight_decay == DECAYS.get(recipe, 0.01)
    assert (optim.kind == "lamb") == recipe.startswith("lamb")
    objective = "nsp" if recipe in ("bert_2018", "lamb_phase1", "lamb_phase2") else "none"
    assert config.expect.objective == (None if recipe in ("fast", "continue") else objective)
    assert (config.model.architecture is Architecture.modernbert) == recipe.startswith(MODERN)
    assert composed(recipe, "model=mini", "optim.lr=7").optim.lr == 7  # what the user says comes last
    assert composed(recipe, "model=mini").model.name == "mini"


@pytest.mark.parametrize(
    ("recipe", "length", "billions"),
    [("modernbert", 1024, 1719), ("modernbert_long", 8192, 250), ("modernbert_decay", 8192, 50), ("mmbert", 1024, 2700)]
    + [(f"ettin_{size}m", 1024, 1700) for size in (17, 32, 68, 150)],
)
def test_tokens_are_the_published_ones(recipe: str, length: int, billions: int) -> None:
    """Of whole samples; steps follow from them, and from the batch as it grows."""
    assert total_samples(composed(recipe)) * length == pytest.approx(billions * 1e9, rel=1e-3)


def test_modernbert_in_one_run_is_its_three_phases() -> None:
    """Step for step the rates, batches and thetas of the three recipes."""
    whole = phases_of(composed("modernbert_phases"))
    for phase, name in zip(whole, ("modernbert", "modernbert_long", "modernbert_decay"), strict=True):
        alone, config, span = composed(name), phase.config, phase.span_of("schedule")
        assert phase.span.steps == alone.steps
        assert config.global_batch_size == alone.global_batch_size
        assert config.optim == alone.optim
        assert config.schedule == alone.schedule
        assert (span.first_step, span.steps) == (phase.span.first_step, alone.steps)
        assert config.expect.max_len == alone.expect.max_len
        theta = {"global_rope_theta": 160_000.0} if phase.number > 1 else {}  # the architecture's own
        assert config.model.extra == {"local_rope_theta": 10_000.0, "global_rope_theta": 10_000.0} | theta
        assert phase.span.samples == pytest.approx(total_samples(alone), rel=1e-3)  # of whole batches


def test_modernbert_in_one_run(trainer: Trainer, singles: Path) -> None:
    small = ("steps=6", "phases.long.from=0.4", "phases.decay.from=0.7", "phases.long.global_batch_size=16")
    sizes = ("phases.long.micro_batch_size=4", "model.architecture=modernbert", "eval.max_samples=8")
    own = f"+phases.long.data.path={singles}"
    result = trainer.run("recipe=modernbert_phases", *small, *sizes, f"data.path={singles}", own)
    assert result.code == 0, result.stderr
    assert "phase 3 of 3, from step 4" in result.stderr
    rates = result.series("train/lr")
    assert rates[2] == rates[3] == 3e-4
    assert rates[5] < rates[4] < 3.1e-4


def test_lamb_decays_by_the_square_root_from_its_peak() -> None:
    config = composed("lamb_phase1")
    after = [learning_rate(step, config.steps, config.optim, config.schedule) for step in (2001, 4519)]
    assert after == pytest.approx([6e-3, 6e-3 * math.sqrt(0.5)], rel=1e-3)  # the end of warm-up, and half of the rest


def test_babylm_saves_at_the_words_of_its_rules() -> None:
    """In millions of words seen, of the 100 that ten epochs are; and no retention takes one away."""
    config = composed("babylm", "steps=10_000")
    assert sorted(config.kept_steps) == [100 * million for million in (*range(1, 11), *range(20, 101, 10))]
    assert retention_of(config).removes(range(100, 10_001, 50)) == [
        step for step in range(100, 9_900, 50) if step not in config.kept_steps
    ]


def test_phase_two_asks_for_phase_one() -> None:
    with pytest.raises(UserError, match="add init_from="):
        cli.compose("train", TrainConfig, ["run=r", "data.path=d", "recipe=lamb_phase2"])


def test_bert_goes_on_with_longer_samples(trainer: Trainer, corpus: Path, tmp_path: Path) -> None:
    """With what its file allows for that, and so do the pages that tell of it."""
    told = {
        path: re.findall(r"recipe=bert_2018 [^']*'phases=\[\{from:([0-9.]+),", path.read_text(encoding="utf-8"))
        for path in (ROOT / "conf/recipe/bert_2018.yaml", ROOT / "docs/recipes.md", ROOT / "docs/tutorial.md")
    }
    assert {share for found in told.values() for share in found} == {"0.9"}
    assert all(told.values())
    (tmp_path / "longer").mkdir()
    make_corpus(tmp_path / "longer", max_len=48, seed=4)
    phases = f"phases=[{{from:0.67,data.path:{tmp_path}/longer,micro_batch_size:2}}]"
    result = trainer.run(f"data.path={corpus}", "recipe=bert_2018", "steps=3", "eval.max_samples=8", phases)
    assert result.code == 0, result.stderr
    assert f"phase 2 of 2, from step 2\ndata {tmp_path}/longer" in result.stderr
    config = composed("bert_2018", "optim.lr=0.003", "schedule.warmup_fraction=0.2")
    rates = [learning_rate(step, 3, config.optim, config.schedule) for step in range(3)]
    assert result.series("train/lr") == pytest.approx(rates)  # one schedule over both


@pytest.fixture(scope="module")
def singles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("singles") / "corpus"
    path.mkdir()
    make_corpus(path, objective="none")
    return path


@pytest.fixture(scope="module")
def begun(trainer: Trainer, corpus: Path, singles: Path) -> dict[bool, Path]:
    """Runs to go on from: a BERT, and (True) a ModernBERT as the first of its recipes leaves it."""
    small = ("steps=3", "eval.max_samples=8")
    modern = (f"data.path={singles}", "recipe=modernbert", "model.architecture=modernbert", *small)
    return {
        False: trainer.run(f"data.path={corpus}", *small).run,
        True: trainer.run(*modern).run,
    }


ALIKE = ("ettin_32m", "ettin_68m", "ettin_150m", "modernbert_decay")  # but for figures


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in ALIKE else [])
        for name in RECIPES
        if name != "modernbert_phases"  # has a test of its own
    ],
)
def test_three_steps(trainer: Trainer, corpus: Path, singles: Path, begun: dict[bool, Path], recipe: str) -> None:
    """The corpus is of 24 tokens, with pairs where the model has a head for them: each mismatch is a warning."""
    modern, expected = recipe.startswith(MODERN), composed(recipe).expect
    overrides = [f"recipe={recipe}", "steps=3", "eval.max_samples=8", f"data.path={singles if modern else corpus}"]
    overrides += ["model.architecture=modernbert"] if modern else []
    overrides += [f"init_from={begun[modern]}"] if expected.init_from and recipe != "modernbert_decay" else []
    if recipe == "modernbert_decay":
        # It would be modernbert_long's; and the whole run decays, so TINY's warm-up has no place.
        overrides += [f"init_from={begun[modern]}", "init_allow=[rope_theta]", "schedule.warmup_fraction=0"]
    if recipe == "cramming":
        overrides += ["batch_ramp.start=4"]
    result = trainer.run(*overrides)
    assert result.codes == (0,), result.stderrs
    assert all(map(math.isfinite, result.series("train/loss")))
    assert result.series("train/skipped_steps") == [0, 0, 0]
    config = cli.typed(yaml.safe_load((result.run / "config.yaml").read_text()), TrainConfig)
    assert config.optim == composed(recipe, "optim.lr=0.003").optim  # as TINY has it
    if not config.budget.hours:
        rates = [learning_rate(step, 3, config.optim, config.schedule) for step in range(3)]
        assert result.series("train/lr") == pytest.approx(rates)
    warnings = [line for line in result.stderr.splitlines() if "as the recipe expects" in line]
    unmet = (bool(expected.max_len), expected.objective not in (None, "none" if modern else "nsp"))
    assert len(warnings) == sum(unmet) + (expected.masking_probability not in (None, 0.15))
    assert any("max_len=24, not max_len=" in line for line in warnings) == bool(expected.max_len)
