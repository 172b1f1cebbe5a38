"""Sparse-to-dense training with transformers.Trainer and with Lightning: switch, save, go on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn
from zoo import HALF_GRID

import monarch_fx as mfx
from monarch_fx import errors

STEPS, SWITCH = 6, 3
OWN_WARNINGS = pytest.mark.filterwarnings("ignore", "error::monarch_fx.errors.MonarchWarning")  # Lightning has many


def language_model() -> nn.Module:
    torch.manual_seed(0)
    model, _ = zoo.gpt2()
    model.loss_type = "ForCausalLM"
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return mfx.monarchify(model, config=HALF_GRID, init="random")


class Sentences(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 48

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids = torch.randint(2, 99, (9,), generator=torch.Generator().manual_seed(i % 4))
        return {"input_ids": ids, "labels": ids}


def is_sparse(model: nn.Module) -> bool:
    return any(name.endswith((".R", ".L")) for name, _ in model.named_parameters())


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., Any]:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("psutil")
    pytest.importorskip("accelerate")
    from monarch_fx.training.trainer import DensifyCallback

    class Watch(transformers.TrainerCallback):
        """Losses and learning rates, and whether the model was sparse."""

        def __init__(self) -> None:
            self.losses: list[float] = []
            self.rates: list[float] = []
            self.sparse: list[bool] = []

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **kw: Any) -> None:
            if "loss" in logs:
                self.losses.append(logs["loss"])
                self.rates.append(logs["learning_rate"])
                self.sparse.append(is_sparse(model))

    def make(
        at: float = SWITCH,
        model: nn.Module | None = None,
        optimizers: Any = (None, None),
        late: bool = False,
        **options: Any,
    ) -> Any:
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=STEPS,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            logging_steps=1,
            save_steps=1,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            **options,
        )
        made = transformers.Trainer(
            language_model() if model is None else model,
            arguments,
            train_dataset=Sentences(),
            optimizers=optimizers,
            callbacks=[] if late else [DensifyCallback(at=at)],
        )
        if late:
            made.add_callback(DensifyCallback(at=at))
        made.watch = Watch()
        made.add_callback(made.watch)
        return made

    return make


@pytest.mark.parametrize("at", [SWITCH, 0.5])
def test_trainer_switches_once_and_goes_on(trainer: Callable, at: float) -> None:
    run = trainer(at=at)
    run.train()
    assert run.watch.sparse == [True] * (SWITCH - 1) + [False] * (STEPS - SWITCH + 1)
    assert run.watch.rates == pytest.approx([1e-2 * (1 - n / STEPS) for n in range(STEPS)])
    assert run.watch.losses[-1] < run.watch.losses[SWITCH] < run.watch.losses[0]


@pytest.mark.parametrize("saved", [SWITCH - 1, SWITCH, SWITCH + 1])
def test_trainer_resumes_from_both_sides_of_the_switch(trainer: Callable, tmp_path: Path, saved: int) -> None:
    """Bit for bit the model of a run that was not stopped, with momenta and second moments."""
    whole = trainer()
    whole.train()
    again = trainer()
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{saved}"))
    assert again.watch.losses == whole.watch.losses[saved:]
    for (name, a), (_, b) in zip(whole.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_callback_that_comes_late_can_not_go_on_behind_the_switch(trainer: Callable, tmp_path: Path) -> None:
    late = trainer(late=True, save_only_model=True)
    late.train()
    assert late.watch.sparse[-1] is False
    with pytest.raises(errors.ConfigError, match="pass it to the trainer when that is made"):
        trainer(late=True).train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS - 1}"))


def test_a_checkpoint_after_the_switch_is_that_of_a_dense_model(trainer: Callable, tmp_path: Path) -> None:
    run = trainer()
    run.train()
    loaded = type(run.model).from_pretrained(tmp_path / f"checkpoint-{STEPS}").eval()
    ids = torch.randint(2, 99, (2, 7))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, run.model.eval()(ids).logits)


def test_trainer_with_accumulation_mixed_precision_and_an_optimizer_of_ones_own(trainer: Callable) -> None:
    model = language_model()
    optimizer = torch.optim.AdamW(mfx.parameter_groups(model, lr=1e-2, weight_decay=0.1))
    run = trainer(model=model, optimizers=(optimizer, None), gradient_accumulation_steps=2, bf16=True)
    run.train()
    assert run.watch.sparse[-1] is False
    assert optimizer.param_groups[2]["params"] == []
    assert run.watch.losses[-1] < run.watch.losses[0]


def test_trainer_compiles(trainer: Callable) -> None:
    run = trainer(torch_compile=True, torch_compile_backend="aot_eager", max_grad_norm=0.5)
    run.train()
    assert run.watch.sparse[-1] is False
    assert run.watch.losses[-1] < run.watch.losses[0]


def test_what_a_trainer_can_not_do_is_refused(trainer: Callable, tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigError, match="at=6 is not before the last of 6 steps"):
        trainer(at=STEPS).train()
    with pytest.raises(errors.ConfigError, match="no Monarch weight"):
        trainer(model=mfx.to_dense(language_model())).train()
    run = trainer()
    run.args.load_best_model_at_end = True
    with pytest.raises(errors.ConfigError, match="load the best checkpoint yourself"):
        run.train()


@pytest.mark.parametrize("at", [0, -3, 0.0, 1.0, 1.5, True, "half"])
def test_the_switch_is_a_step_or_a_share(at: Any) -> None:
    pytest.importorskip("transformers")
    from monarch_fx.training.trainer import DensifyCallback

    with pytest.raises(errors.ConfigError, match="a positive number of steps or a share"):
        DensifyCallback(at=at)


@pytest.fixture
def lightning(tmp_path: Path) -> Callable[..., Any]:
    pl = pytest.importorskip("lightning.pytorch")
    from monarch_fx.training.lightning import DensifyCallback

    class Module(pl.LightningModule):
        def __init__(self, optimizers: int = 1) -> None:
            super().__init__()
            torch.manual_seed(0)
            mlp = mfx.monarchify(zoo.mlp(), config=HALF_GRID, init="random", example_inputs=torch.randn(4, 64))
            self.model, self.count, self.losses, self.sparse = mlp, optimizers, [], []
            self.automatic_optimization = optimizers == 1

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss = self.model(batch).square().mean()
            self.losses.append(loss.item())
            self.sparse.append(is_sparse(self))
            return loss

        def configure_optimizers(self) -> Any:
            made = [torch.optim.AdamW(self.parameters(), lr=1e-2) for _ in range(self.count)]
            return made, [torch.optim.lr_scheduler.CosineAnnealingLR(made[0], STEPS)]

    def fit(at: float = SWITCH, resume: Path | None = None, optimizers: int = 1) -> Any:
        module = Module(optimizers)
        rows = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
        data = torch.utils.data.DataLoader(rows.repeat(STEPS, 1), 16)  # equal batches: resuming starts at the first one
        trainer = pl.Trainer(
            max_steps=STEPS,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[
                DensifyCallback(at=at),
                pl.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1),
            ],
        )
        trainer.fit(module, data, ckpt_path=resume, weights_only=True)
        return module

    return fit


@OWN_WARNINGS
@pytest.mark.parametrize("at", [SWITCH, 0.5])
def test_lightning_switches_once_and_goes_on(lightning: Callable, at: float) -> None:
    module = lightning(at=at)
    assert module.sparse == [True] * SWITCH + [False] * (STEPS - SWITCH)
    assert module.losses[-1] < module.losses[SWITCH] < module.losses[0]


@OWN_WARNINGS
@pytest.mark.parametrize("saved", [SWITCH - 1, SWITCH, SWITCH + 1])
def test_lightning_resumes_from_both_sides_of_the_switch(lightning: Callable, tmp_path: Path, saved: int) -> None:
    whole = lightning()
    again = lightning(resume=tmp_path / f"step={saved}.ckpt")
    assert again.losses == whole.losses[saved:]
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


@OWN_WARNINGS
def test_what_lightning_can_not_do_is_refused(lightning: Callable) -> None:
    with pytest.raises(errors.ConfigError, match="for one optimizer, the module has 2"):
        lightning(optimizers=2)
    with pytest.raises(errors.ConfigError, match="at=6 is not before the last of 6 steps"):
        lightning(at=STEPS)
