"""The real Trainer, Lightning and Accelerate on a CPU: a window that runs out of memory is redone, same weights."""

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.reference

from guard_ranks import PER_SAMPLE, _Work, memory_limit, same, weights  # noqa: E402

from ullage.errors import InputError  # noqa: E402

VOCABULARY, LENGTH = 32, 8


def tokens(size=24):
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, VOCABULARY, (size, LENGTH), generator=generator)


def close(one, other):
    return max(float((left - right).abs().max()) for left, right in zip(one, other, strict=True)) < 1e-5


def hf_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def hungry(module):
    """Make a module need work space per sample."""
    module.register_forward_hook(lambda _module, _inputs, output: _Work.apply(output, "both"))


def hf_run(folder, *, guarded, samples=0, labels=None, **settings):
    from transformers import Trainer, TrainingArguments

    from ullage.guard import guard_trainer

    model = hf_model()
    rows = [
        {"input_ids": row, "labels": row.clone() if labels is None else labels[at]} for at, row in enumerate(tokens())
    ]
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=4,
        report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True, logging_steps=1, learning_rate=1e-2,
        max_grad_norm=0.5, seed=3, data_seed=3,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    guard = guard_trainer(trainer, **settings) if guarded else None
    if samples:
        hungry(model.model.layers[0].mlp)
        with memory_limit(int(samples * PER_SAMPLE)):
            trainer.train()
    else:
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return weights(model), losses, guard


def test_trainer_undisturbed_is_the_trainer(tmp_path):
    plain, plain_losses, _none = hf_run(tmp_path, guarded=False)
    got, losses, guard = hf_run(tmp_path, guarded=True)
    assert same(got, plain) and losses == plain_losses
    assert guard.guard.redone == 0 and guard.guard.steps == 4


def test_trainer_redoes_a_window_that_ran_out_of_memory(tmp_path):
    labels = tokens().clone()
    labels[::3, :5] = -100  # an uneven number of tokens per sample
    plain, plain_losses, _none = hf_run(tmp_path, guarded=False, labels=labels)
    got, losses, guard = hf_run(tmp_path, guarded=True, labels=labels, samples=3)
    assert guard.guard.redone == 1 and guard.guard.micro_batch == 2
    assert close(got, plain) and losses == pytest.approx(plain_losses, rel=1e-3)


def test_trainer_turns_checkpointing_on_and_counts_tokens_of_a_mean(tmp_path):
    got = hf_run(tmp_path, guarded=False)[0]
    from ullage.guard import CannotFit

    with pytest.raises(CannotFit):
        hf_run(tmp_path, guarded=True, samples=0.5, recompute="auto")
    from transformers import Trainer, TrainingArguments

    from ullage.guard import guard_trainer

    trainer = Trainer(model=hf_model(), args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[]))
    adapter = guard_trainer(trainer)
    labels = torch.tensor([[1, -100, 3], [1, 2, 3]])
    assert adapter._count({"labels": labels, "input_ids": labels}) == 3
    assert got


def test_trainer_where_it_cannot_work(tmp_path):
    from transformers import Trainer, TrainingArguments

    from ullage.guard import guard_trainer

    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], auto_find_batch_size=True)
    with pytest.raises(InputError, match="auto_find_batch_size"):
        guard_trainer(Trainer(model=hf_model(), args=arguments))


def lightning_run(folder, *, guarded, samples=0):
    import lightning
    from torch.utils.data import DataLoader

    from ullage.guard import GuardCallback

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(2)
            self.net = torch.nn.Sequential(torch.nn.Linear(LENGTH, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))

        def training_step(self, batch, batch_idx):
            loss = self.net(batch.float()).square().mean()
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    module = Module()
    callback = GuardCallback(micro_batch=6)
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=2, accumulate_grad_batches=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=0.5,
        callbacks=[callback] if guarded else [], default_root_dir=str(folder),
    )  # fmt: skip
    loader = DataLoader(tokens(), batch_size=6)
    if samples:
        hungry(module.net[1])
        with memory_limit(samples * PER_SAMPLE):
            trainer.fit(module, loader)
    else:
        trainer.fit(module, loader)
    return weights(module), callback


def test_lightning(tmp_path):
    plain, _callback = lightning_run(tmp_path, guarded=False)
    got, callback = lightning_run(tmp_path, guarded=True)
    assert same(got, plain) and callback.guard.redone == 0 and callback.guard.steps == 4
    got, callback = lightning_run(tmp_path, guarded=True, samples=4)
    assert callback.guard.redone == 1 and callback.guard.micro_batch == 3
    assert close(got, plain)


def accelerated(_rank, _size, _port, folder):
    """Train plainly, guarded with room, and guarded with room for four of six samples, in one fresh heap."""
    from accelerate import Accelerator

    from ullage.guard import guard_accelerate

    results, guard = [], None
    for samples in (None, 20, 4):
        accelerator = Accelerator(cpu=True)
        torch.manual_seed(2)
        net = torch.nn.Sequential(torch.nn.Linear(LENGTH, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
        hungry(net[1])
        model, optimizer = accelerator.prepare(net, torch.optim.AdamW(net.parameters(), lr=1e-2))
        guard = guard_accelerate(accelerator, model, optimizer, micro_batch=6, max_grad_norm=0.5) if samples else None
        for batch in tokens().float().split(6):
            if guard:
                with memory_limit(samples * PER_SAMPLE):
                    guard.step(batch, lambda micro, model=model: model(micro).square().mean())
                continue
            accelerator.backward(model(batch).square().mean())
            accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        results.append(weights(net))
    found = {
        "undisturbed": same(results[0], results[1]), "close": close(results[0], results[2]),
        "micro_batch": guard.micro_batch, "redone": guard.redone,
    }  # fmt: skip
    torch.save(found, f"{folder}/rank-0.pt")


def test_accelerate(tmp_path):
    """In a process of its own: the limit is of address space, and a heap that others have used is not free to give."""
    from test_guard_equal import spawn

    (found,) = spawn(accelerated, tmp_path, 1)
    assert found == {"undisturbed": True, "close": True, "micro_batch": 3, "redone": 1}


def test_accelerate_where_it_cannot_work():
    from accelerate import Accelerator

    from ullage.guard import guard_accelerate

    with pytest.raises(InputError, match="accumulate"):
        guard_accelerate(Accelerator(cpu=True, gradient_accumulation_steps=2), None, None, micro_batch=1)


def test_trainer_on_two_ranks(tmp_path):
    import guard_ranks
    from test_guard_equal import spawn

    runs = spawn(guard_ranks.trainer, tmp_path, 2)
    for rank in runs:
        assert rank["redone"] == 1 and rank["plan"] == runs[0]["plan"] and "micro_batch@8" in rank["plan"]
        assert rank["difference"] < 1e-5
