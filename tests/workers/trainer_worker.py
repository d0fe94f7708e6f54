"""``DPTrainer`` on gloo ranks, by FSDP2 and by replicas: ``torchrun tests/workers/trainer_worker.py``."""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from integrations.test_transformers_trainer import MODELS, Looks, Rows, model_and_rows
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import Subset
from transformers import AutoModelForSequenceClassification, TrainerCallback, TrainingArguments

import dpcompile
from dpcompile.integrations.transformers import DPTrainer, PrivacyArguments, losses
from dpcompile.regions.units import is_sharded

SHARDED: dict[str, Any] = {"fsdp": True, "fsdp_config": {"fsdp_version": 2}}
SAVES: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None}


def folder() -> str:
    made = [tempfile.mkdtemp() if dist.is_initialized() and dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(made)
    return made[0]


def trainer(
    model: Any, rows: Any, *, given: dict[str, Any] | None = None, path: str = "", seed: int | None = 5, **options: Any
) -> Any:
    """Draws of 8 of 24, by two ranks in physical batches of 2: six steps."""
    arguments: dict[str, Any] = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    arguments |= {"num_train_epochs": 2, "learning_rate": 0.01, "optim": "adamw_torch", "weight_decay": 0.1}
    arguments |= {"use_cpu": True, "report_to": [], "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True}
    arguments |= {"dataloader_pin_memory": False, "max_grad_norm": 0.7, "log_level": "error"}
    privacy = PrivacyArguments(noise_multiplier=1.0, target_delta=1e-3, backend="eager", noise_seed=seed)
    args = TrainingArguments(path or tempfile.mkdtemp(), **{**arguments, **options})
    return DPTrainer(model, args, train_dataset=rows, privacy=privacy, **(given or {}))


def whole(model: nn.Module) -> dict[str, Tensor]:
    full = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in model.named_parameters()}  # type: ignore[operator]
    return {n.replace("._checkpoint_wrapped_module", ""): p.detach().clone() for n, p in full.items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def alone(name: str, steps: int = 6, adapt: Any = None, smoothing: float = 0.0, planned: int = 6) -> dict[str, Tensor]:
    """Our own loop, on the draws of all ranks, in one process."""
    plain, rows = model_and_rows(name)
    plain = plain if adapt is None else adapt(plain)
    names = DPTrainer.get_decay_parameter_names(None, plain)  # type: ignore[arg-type]
    trained = {n: p for n, p in plain.named_parameters() if p.requires_grad}
    parts = [[p for n, p in trained.items() if (n in names) is decays] for decays in (True, False)]
    groups = [{"params": part, "weight_decay": decay} for part, decay in zip(parts, (0.1, 0.0), strict=True) if part]
    inner = torch.optim.AdamW(groups, lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(inner, lambda step: (planned - step) / planned)
    draws = dpcompile.PoissonLoader(rows, expected_batch_size=8, physical_batch_size=4, seed=5, rank=0, world_size=1)
    private, optimizer, loader = dpcompile.make_private(
        plain, inner, draws, noise_multiplier=1.0, max_grad_norm=0.7, seed=5, backend="eager"
    )
    while optimizer.logical_step < steps:
        for batch in loader.parts():
            last = not optimizer.accumulating
            labels = {"labels": batch.pop("labels")}
            outputs: Any = private(**batch)
            kind = losses.kind_of(plain, labels, outputs)
            losses.head_losses(kind, outputs, labels, smoothing).mean().backward()
            optimizer.step()
            if last:
                schedule.step()
                optimizer.zero_grad()
            if optimizer.logical_step == steps and last:
                break
    return whole(plain)


def sharded_weights() -> None:
    """Full fine-tuning, evaluated in the middle: the weights of one process, and what is shown is that of all ranks."""
    for name, smoothing in (("classes", 0.1), ("gpt2", 0.0), ("llama", 0.0)):
        model, rows = model_and_rows(name)
        evaluated: dict[str, Any] = {"eval_dataset": Rows(MODELS[name][1], 9)}
        watched: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2, "label_smoothing_factor": smoothing}
        sharded = {"fsdp": "full_shard", "fsdp_config": {"fsdp_version": 2}} if name == "gpt2" else SHARDED
        run = trainer(model, rows, given=evaluated, **sharded, **watched)
        if name == "classes":  # before anything is private
            before = run.evaluate()["eval_loss"]
            one, _ = model_and_rows(name)
            assert before == pytest.approx(
                trainer(one, rows, given=evaluated, **watched).evaluate()["eval_loss"], rel=1e-5
            )
            run = trainer(model, rows, given=evaluated, **sharded, **watched)  # sharded already
        run.train()
        assert run.model is model and is_sharded(model) and run.is_fsdp_enabled
        assert sum(map(is_sharded, model.modules())) > 1
        assert run.state.global_step == run._private.optimizer.logical_step == 6
        assert_same(whole(model), alone(name, smoothing=smoothing))
        shown = [[e.get("loss"), e.get("eval_loss"), e["epsilon"]] for e in run.state.log_history]
        everywhere = [None, None]
        dist.all_gather_object(everywhere, shown)
        assert everywhere[0] == everywhere[1] and len(shown) == 10


def replica_weights() -> None:
    for name in ("classes", "gpt2"):
        model, rows = model_and_rows(name)
        if dist.is_initialized() and dist.get_rank() == 1:  # starts as on the first rank
            with torch.no_grad():
                next(model.parameters()).add_(1.0)
        run = trainer(
            model, rows, given={"eval_dataset": Rows(MODELS[name][1], 9)}, eval_strategy="steps", eval_steps=2
        )
        run.train()
        assert run.model is model and not run.is_fsdp_enabled
        assert_same(whole(model), alone(name))


def resumed() -> None:
    """From within a pass: weights, optimizer, noise, draws and accountant; the best weights in the end; saved whole."""
    expected = alone("classes")
    evaluated: dict[str, Any] = {"eval_dataset": Rows("classes", 9)}
    for mode in ("FULL_STATE_DICT", "SHARDED_STATE_DICT", None):
        sharded = {**SHARDED, "fsdp_config": {"fsdp_version": 2, "state_dict_type": mode}} if mode else {}
        path = folder()
        model, rows = model_and_rows("classes")
        trainer(model, rows, path=path, given={"callbacks": [Looks(4)]}, **sharded, **SAVES).train()
        again, _ = model_and_rows("classes")
        run = trainer(again, rows, path=path, given=evaluated, seed=None, **sharded, **SAVES, eval_strategy="steps",
                      eval_steps=1, load_best_model_at_end=mode == "FULL_STATE_DICT")  # fmt: skip
        if mode == "FULL_STATE_DICT":
            run.add_callback(Last(run, expected))
        run.train(resume_from_checkpoint=True)
        assert (
            run.state.global_step == run._private.optimizer.logical_step == 6
            and run._private.optimizer.accountant.steps == 6
        )
        if mode != "FULL_STATE_DICT":
            assert_same(whole(again), expected)
            continue
        best = min((e["eval_loss"], e["step"]) for e in run.state.log_history if "eval_loss" in e)
        assert run.evaluate()["eval_loss"] == pytest.approx(best[0], rel=1e-5)
        run.save_model(f"{path}/saved")
        dist.barrier()
        loaded = AutoModelForSequenceClassification.from_pretrained(f"{path}/saved")
        assert_same(whole(loaded), whole(again))
        assert not {"private_loader.pt", "optimizer.bin"} & set(os.listdir(f"{path}/saved"))


class Last(TrainerCallback):
    """Compares the weights when the last step is done."""

    def __init__(self, run: Any, expected: dict[str, Tensor]) -> None:
        self.run, self.expected = run, expected

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == state.max_steps:
            assert_same(whole(self.run.model), self.expected)


def adapters() -> None:
    peft = pytest.importorskip("peft")

    def adapt(base: Any) -> Any:
        torch.manual_seed(3)
        return peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))

    path, expected = folder(), alone("llama", adapt=adapt)
    base, rows = model_and_rows("llama")
    model = adapt(base)
    trainer(model, rows, path=path, given={"callbacks": [Looks(4)]}, **SHARDED, **SAVES).train()
    model = adapt(model_and_rows("llama")[0])
    run = trainer(model, rows, path=path, seed=None, **SHARDED, **SAVES)
    run.train(resume_from_checkpoint=True)
    assert_same(whole(model), expected)
    again = peft.PeftModel.from_pretrained(model_and_rows("llama")[0], f"{path}/checkpoint-6")
    assert_same(whole(again), expected)


def activation_checkpointing() -> None:
    expected = alone("llama")
    config = {"fsdp_version": 2, "activation_checkpointing": True}
    for options in ({**SHARDED, "fsdp_config": config}, {**SHARDED, "activation_checkpointing": True}):
        model, rows = model_and_rows("llama")
        trainer(model, rows, **options).train()
        assert_same(whole(model), expected)


def twice() -> None:
    """A second ``train()`` goes on: with the same accountant, and draws and noise that were not used."""
    model, rows = model_and_rows("classes")
    run = trainer(model, rows, given={"eval_dataset": Rows("classes", 9)}, **SHARDED, lr_scheduler_type="constant")
    run.train()
    once = run.epsilon
    run.evaluate()
    run.train()
    assert run.epsilon > once and run._private.optimizer.accountant.steps == 12


def sft() -> None:
    """TRL's SFTTrainer: the same weights and evaluation by shards as by replicas; DPO is refused."""
    trl: Any = pytest.importorskip("trl")
    from integrations import test_trl

    from dpcompile.integrations.trl import DPDPOTrainer, DPSFTTrainer

    os.environ["CI"] = "1"  # TRL counts its trainers, but not there
    rows, held_out = test_trl.texts("text"), test_trl.texts("text", 9, 1)
    found = []
    for sharded in (SHARDED, {}):
        model = test_trl.llama()
        options: dict[str, Any] = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2}
        options |= {"learning_rate": 0.01, "bf16": False, "use_cpu": True, "report_to": [], "save_strategy": "no"}
        args = trl.SFTConfig(tempfile.mkdtemp(), disable_tqdm=True, log_level="error", **options, **sharded)
        privacy = PrivacyArguments(noise_multiplier=1.0, target_delta=1e-3, backend="eager", noise_seed=5)
        given: dict[str, Any] = {"train_dataset": rows, "eval_dataset": held_out, "privacy": privacy}
        run = DPSFTTrainer(model, args=args, processing_class=test_trl.tokenizer(), **given)
        run.train()
        assert is_sharded(model) is bool(sharded)
        found.append((whole(model), run.evaluate()["eval_loss"]))
    assert_same(found[0][0], found[1][0])
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)
    for sharded in (SHARDED, {}):
        config = trl.DPOConfig(tempfile.mkdtemp(), bf16=False, use_cpu=True, report_to=[], **sharded)
        pairs: dict[str, Any] = {"train_dataset": test_trl.texts("pairs"), "processing_class": test_trl.tokenizer()}
        with pytest.raises(dpcompile.PrivacyError, match="DPO on 2 ranks"):
            DPDPOTrainer(
                test_trl.llama(),
                args=config,
                privacy=PrivacyArguments(noise_multiplier=1.0, target_delta=1e-3),
                **pairs,
            )


def refused() -> None:
    model, rows = model_and_rows("classes")
    for options, message in (
        ({"fsdp_version": 1}, "FSDP1's flattened parameters"),
        ({"fsdp_version": 2, "cpu_ram_efficient_loading": True}, "the weights of all ranks but the first"),
        ({"fsdp_version": 2, "xla": True}, "the shards of XLA are not those of torch"),
    ):
        with pytest.raises(dpcompile.DPCompileError, match=message):
            trainer(model, rows, fsdp=True, fsdp_config=options)
    rank = dist.get_rank()
    with pytest.raises(dpcompile.PrivacyError, match="disagree about"):
        trainer(model_and_rows("classes")[0], Subset(rows, range(20 + rank)), **SHARDED).train()
    with pytest.raises(dpcompile.PrivacyError, match="the ranks read different examples"):
        trainer(model_and_rows("classes")[0], Rows("classes", 24, seed=rank)).train()

    def more_steps(optimizer: Any, **_: Any) -> None:
        optimizer.step()

    with pytest.raises(dpcompile.PrivacyError, match="without a clipped backward since the last step"):
        trainer(model_and_rows("classes")[0], rows, given={"callbacks": [Looks(do=more_steps)]}, **SHARDED).train()

    class Clips(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)

    with pytest.raises(dpcompile.PrivacyError, match="did not come out of the clipped backward alone"):
        trainer(model_and_rows("classes")[0], rows, given={"callbacks": [Clips()]}, **SHARDED).train()
    model_too, _ = model_and_rows("classes")
    fully_shard(model_too)
    with pytest.raises(dpcompile.PrivacyError, match="the Trainer does not know of it"):
        trainer(model_too, rows).train()
    with pytest.raises(RuntimeError, match="`optimizers` is not allowed if PyTorch FSDP is enabled"):
        own = (torch.optim.SGD(model.parameters(), lr=0.1), None)
        trainer(model, rows, given={"optimizers": own}, **SHARDED)


CHECKS = {
    "sharded_weights": sharded_weights,
    "replica_weights": replica_weights,
    "resumed": resumed,
    "adapters": adapters,
    "activation_checkpointing": activation_checkpointing,
    "twice": twice,
    "sft": sft,
    "refused": refused,
}

if __name__ == "__main__":
    from launching import run_checks

    warnings.filterwarnings("ignore")
    dist.init_process_group("gloo")
    run_checks(CHECKS, sys.argv[1:])
