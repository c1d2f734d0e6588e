"""One process: real out-of-memory by a limit, the ladder, what is released, restarts, the optimizer, checkpoints."""

import errno
import gc
import math
import os
import weakref

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.reference

from guard_ranks import PER_SAMPLE, Net, _Work, data, memory_limit, optimizer_of, same, weights  # noqa: E402

from ullage.errors import InputError  # noqa: E402
from ullage.guard import CannotFit, Checkpoint, Guard, Plan, PlanStore, RestartRequired  # noqa: E402


def built(exact=True, **settings):
    net = Net(exact)
    optimizer = optimizer_of(net, exact)
    return net, optimizer, Guard(net, optimizer, **{"micro_batch": 8, "loss_reduction": "sum", **settings})


def test_a_window_is_redone_smaller_with_the_same_weights(tmp_path):
    net, _optimizer, guard = built(store=PlanStore(tmp_path / "plan.json"))
    reference, reference_optimizer = Net(), None
    reference_optimizer = optimizer_of(reference, True)
    for step, samples in enumerate((8, 6, 3, 20)):
        net.where = "both"
        with memory_limit(samples * PER_SAMPLE + (32 << 20)):
            loss = guard.step(data(step, 0), lambda micro: net(micro).sum())
        expected = reference(data(step, 0)).sum()
        expected.backward()
        reference_optimizer.step()
        reference_optimizer.zero_grad()
        assert float(loss) == float(expected)
    assert same(weights(net), weights(reference))
    assert guard.plan.get("micro_batch@16") == 2
    assert PlanStore(tmp_path / "plan.json").load() == guard.plan

    again, _optimizer, second = built(store=PlanStore(tmp_path / "plan.json"))
    with memory_limit(3 * PER_SAMPLE):
        again.where = "forward"
        second.step(data(0, 0), lambda micro: again(micro).sum())
    assert second.redone == 0 and second.micro_batch == 2, "what is safe is remembered"


def test_the_mean_is_weighted_with_an_uneven_last_micro_batch():
    net, _optimizer, guard = built(exact=False, micro_batch=3, loss_reduction="mean")
    batch = data(0, 0, size=7)
    expected = net(batch).square().mean()
    expected.backward()
    gradients = [each.grad.clone() for each in net.parameters()]
    net.zero_grad()
    loss = guard.gradients([batch], lambda micro: net(micro).square().mean())
    assert math.isclose(float(loss), float(expected), rel_tol=1e-6)
    for parameter, gradient in zip(net.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_tokens_weigh_where_they_are_counted():
    net, _optimizer, guard = built(
        exact=False, micro_batch=2, loss_reduction="mean", count=lambda batch: int(batch["keep"].sum())
    )
    keep = torch.tensor([[1, 0], [1, 1], [0, 1], [1, 1], [1, 1]])

    def loss_of(micro):
        return (net(micro["inputs"])[:, :2] * micro["keep"]).sum() / micro["keep"].sum()

    batch = {"inputs": data(0, 0, size=5), "keep": keep, "name": "kept as it is"}
    expected = loss_of(batch)
    expected.backward()
    gradient = net.layers[0].weight.grad.clone()
    net.zero_grad()
    assert math.isclose(float(guard.gradients([batch], loss_of)), float(expected), rel_tol=1e-5)
    torch.testing.assert_close(net.layers[0].weight.grad, gradient)


def test_random_numbers_and_batch_statistics_are_restored():
    net = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.BatchNorm1d(16), torch.nn.Dropout(0.5))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    seen = []

    def loss_of(micro):
        output = net(micro)
        seen.append((output.detach().clone(), torch.rand(1).item(), net[1].running_mean.clone()))
        if len(seen) == 1:
            raise torch.OutOfMemoryError(TRANSIENT)
        return output.sum()

    Guard(net, optimizer, micro_batch=8).step(data(0, 0), loss_of)
    (first, one, mean), (second, other, again) = seen
    assert torch.equal(first, second) and one == other and torch.equal(mean, again)
    assert int(net[1].num_batches_tracked) == 1


TRANSIENT = (
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.25 GiB of which 10.00 MiB is "
    "free. Including non-PyTorch memory, this process has 79.00 GiB memory in use. Of the allocated memory 70.00 GiB "
    "is allocated by PyTorch, and 8.00 GiB is reserved by PyTorch but unallocated."
)


def test_an_unchanged_retry_comes_first_where_enough_was_cached():
    net, _optimizer, guard = built(exact=False)
    calls = []

    def loss_of(micro):
        calls.append(len(micro))
        if len(calls) <= 2:
            raise torch.OutOfMemoryError(TRANSIENT)
        return net(micro).sum()

    guard.step(data(0, 0), loss_of)
    assert calls == [8, 8, 4, 4], "once unchanged, then smaller"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "device"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "device"),
        (RuntimeError("CUDA error: out of memory"), "device"),
        (RuntimeError("NCCL error: unhandled cuda error, Cuda failure 'out of memory'"), "dead"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "dead"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."), "host"),
        (MemoryError(), "host"),
        (RuntimeError("shape mismatch"), None),
        (ValueError("CUDA out of memory"), None),
        (KeyError("x"), None),
    ],
)
def test_what_is_out_of_memory(error, kind):
    from ullage.guard.classify import classify

    found = classify(error)
    assert (found.kind if found else None) == kind
    wrapper = ValueError("step failed")
    wrapper.__cause__ = error
    found = classify(wrapper)
    assert (found.kind if found else None) == kind


def test_other_errors_come_through_as_they_are():
    _net, _optimizer, guard = built(exact=False)
    with pytest.raises(ZeroDivisionError):
        guard.step(data(0, 0), lambda micro: 1 / 0)
    with pytest.raises(KeyboardInterrupt):
        guard.step(data(0, 0), lambda micro: (_ for _ in ()).throw(KeyboardInterrupt()))


def test_everything_a_failed_attempt_held_is_released():
    net, _optimizer, guard = built()
    held, alive, kept = [], [], []

    class Thing:
        pass

    def deep(micro):
        activation, thing = net(micro), Thing()
        held.extend((weakref.ref(activation), weakref.ref(thing)))
        try:
            raise ValueError("an earlier error, handled while memory runs out")
        except ValueError:
            try:
                _Work.apply(activation, "forward")
            except RuntimeError as error:
                kept.append((error, error.__traceback__))  # as a debugger, a logger or an interactive session does
                raise
            return activation.sum()

    def loss_of(micro):
        if held:  # the second attempt: the first one's tensors and frames must be gone by now
            gc.collect()
            alive.append([each() for each in held[:2]])
            alive.append([parameter.grad for parameter in net.parameters()])
            return net(micro).sum()
        return deep(micro)

    with memory_limit(6 * PER_SAMPLE):
        guard.step(data(0, 0), loss_of)
    assert alive[0] == [None, None] and set(alive[1]) == {None}


def test_offload_keeps_what_is_saved_in_host_memory():
    net, _optimizer, guard = built(exact=False, offload="auto", loss_reduction="mean")
    plain = net(data(0, 0)).square().mean()
    plain.backward()
    gradient = net.layers[0].weight.grad.clone()
    net.zero_grad()
    guard.change_plan(guard.plan.shrunk("test", offload=True))
    saved = []
    pack = torch.autograd.graph.save_on_cpu

    class Watched(pack):
        def __init__(self, pin_memory=False):
            saved.append(pin_memory)
            super().__init__(pin_memory=pin_memory)

    torch.autograd.graph.save_on_cpu = Watched
    try:
        guard.gradients([data(0, 0)], lambda micro: net(micro).square().mean())
    finally:
        torch.autograd.graph.save_on_cpu = pack
    assert saved == [False]
    assert torch.equal(net.layers[0].weight.grad, gradient)


def test_a_router_is_watched():
    from ullage.guard import ExpertWatch

    net, _optimizer, guard = built(exact=False)
    router = torch.nn.Linear(16, 4)
    watch = ExpertWatch(guard, num_experts=4, num_ranks=2, bytes_per_token=1, limit_bytes=10)
    with torch.no_grad():
        router.weight.zero_()
        router.bias.copy_(torch.tensor([3.0, 2.0, 1.0, 0.0]))  # all tokens to the experts of the first rank
    watch.attach(router, pick=lambda logits: logits.topk(2).indices)
    sizes = []

    def loss_of(micro):
        router(micro)
        return net(micro).mean()

    for step in range(3):
        guard.step(data(step, 0), loss_of)
        sizes.append(guard.micro_batch)
    assert sizes == [8, 4, 4], "16 choices on one rank are above 10, 8 are not"
    other = torch.nn.Identity()
    watch.attach(other)
    with pytest.raises(InputError, match="beyond"):
        other(torch.tensor([9]))


def test_recompute_then_offload_then_restart_then_cannot_fit(tmp_path, capsys):
    store, turned = PlanStore(tmp_path / "plan.json"), []
    for attempt in range(3):
        net, _optimizer, guard = built(
            store=store,
            recompute=lambda on: turned.append("recompute"),
            offload=lambda on: turned.append("offload"),
            restart_plans=({"zero_stage": 3},),
        )
        net.where = "forward"
        with memory_limit(PER_SAMPLE // 2), pytest.raises(SystemExit) as ended:
            guard.step(data(0, 0), lambda micro: net(micro).sum())  # noqa: B023
        assert ended.value.code == (75, 75, 3)[attempt]
        assert isinstance(ended.value, CannotFit if attempt == 2 else RestartRequired)
        plan = store.load()
        assert (plan.get("recompute"), plan.get("offload"), plan.get("zero_stage")) == ("full", True, 3)
    assert turned == ["recompute", "offload"] * 3, "switched on at once after a restart"
    assert plan.get("micro_batch@16") == 1
    assert "CANNOT FIT" in capsys.readouterr().err


def fitted(machine):
    """Full training of a 16B model: fits eight large GPUs when sharded, and no small one."""
    from ullage import TrainingJob, TrainingParallel, fit_train, load_model, parse_machine

    gpus = parse_machine(machine)
    return fit_train(
        TrainingJob(
            model=load_model("deepseek-v2-lite"),
            machine=gpus,
            engine="fsdp2",
            parallel=TrainingParallel(data_parallel_size=gpus.num_gpus, fsdp="full_shard"),
            seq_len=1024,
        ),
        advise=False,
    )


def test_without_a_store_the_end_says_what_the_ledger_says(capsys):
    job = fitted("8xH200")
    net, _optimizer, guard = built(job=job)
    net.where = "forward"
    with memory_limit(PER_SAMPLE // 2), pytest.raises(CannotFit) as ended:
        guard.step(data(0, 0), lambda micro: net(micro).sum())
    assert "268435456 bytes" in ended.value.words and "the ledger says" in ended.value.words


def test_a_job_that_cannot_fit_is_refused_at_the_start():
    job = fitted("1xL4")
    with pytest.raises(CannotFit, match="3") as ended:
        built(job=job)
    assert "weights" in ended.value.words or "optimizer" in ended.value.words


class Heavy(torch.optim.SGD):
    """Needs work space in its step, after it has changed the first weight."""

    need = 0

    def step(self, closure=None):
        if self.need:
            with torch.no_grad():
                next(iter(self.param_groups[0]["params"])).add_(1)
            torch.empty(self.need, dtype=torch.uint8)
        return super().step(closure)


def heavy(**settings):
    net = Net(False)
    optimizer = Heavy(net.parameters(), lr=0.1)
    return net, optimizer, Guard(net, optimizer, micro_batch=8, **settings)


def test_a_failed_optimizer_step_restarts(tmp_path):
    net, optimizer, guard = heavy(store=PlanStore(tmp_path / "plan.json"))
    optimizer.need = PER_SAMPLE
    with memory_limit(PER_SAMPLE // 2), pytest.raises(RestartRequired) as ended:
        guard.step(data(0, 0), lambda micro: net(micro).mean())
    assert "optimizer step" in ended.value.words
    net, optimizer, guard = heavy()
    optimizer.need = PER_SAMPLE
    with memory_limit(PER_SAMPLE // 2), pytest.raises(CannotFit):
        guard.step(data(0, 0), lambda micro: net(micro).mean())


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_failed_optimizer_step_goes_back_to_the_checkpoint(tmp_path, on_disk):
    position, back = [0], []
    checkpoint = Checkpoint(tmp_path / "ck" if on_disk else None, every=2, position=lambda: {"step": position[0]})

    def shrink(on):
        optimizer.need = 0

    net, optimizer, guard = heavy(checkpoint=checkpoint, rewind=back.append, offload=shrink)
    kept = None
    for step in range(3):
        position[0] = step + 1
        optimizer.need = PER_SAMPLE if step == 2 else 0
        with memory_limit(PER_SAMPLE // 2):
            guard.step(data(step, 0), lambda micro: net(micro).mean())
        if step == 1:
            kept = weights(net)
    assert back == [{"step": 2}] and guard.steps == 2
    assert same(weights(net), kept), "nothing of the half step is left"


def test_a_checkpoint_holds_optimizer_scheduler_and_random_state(tmp_path):
    def one():
        torch.manual_seed(3)
        net = Net(False)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        checkpoint = Checkpoint(tmp_path / "ck", every=3, position=lambda: [1, 2])
        guard = Guard(net, optimizer, micro_batch=4, scheduler=scheduler, checkpoint=checkpoint)
        return net, guard

    def run(net, guard, steps):
        for step in steps:
            guard.step(data(step, 0), lambda micro: torch.nn.functional.dropout(net(micro), 0.5).mean())

    net, guard = one()
    assert guard.load_checkpoint() is None
    run(net, guard, range(6))
    for name in tmp_path.iterdir():
        assert name.name == "ck.rank-0"
    run(net, guard, range(6, 8))
    again, second = one()
    assert second.load_checkpoint() == [1, 2] and second.steps == 6
    run(again, second, range(6, 8))
    assert same(weights(net), weights(again))


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    said = []
    checkpoint = Checkpoint(tmp_path / "ck", every=1)
    net, _optimizer, guard = built(exact=False, checkpoint=checkpoint, on_event=said.append)
    guard.step(data(0, 0), lambda micro: net(micro).mean())
    before = (tmp_path / "ck.rank-0").read_bytes()

    def full(_value, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", full)
    guard.step(data(1, 0), lambda micro: net(micro).mean())
    assert (tmp_path / "ck.rank-0").read_bytes() == before
    assert "the disk is full" in said[-1] and "is kept" in said[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["ck.rank-0"]


def test_a_corrupt_checkpoint_is_refused(tmp_path):
    (tmp_path / "ck.rank-0").write_bytes(b"no checkpoint")
    _net, _optimizer, guard = built(exact=False, checkpoint=Checkpoint(tmp_path / "ck"))
    with pytest.raises(InputError, match="cannot be read"):
        guard.load_checkpoint()


def test_a_corrupt_store_is_refused_and_kept(tmp_path):
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(InputError, match="corrupt-1"):
        built(store=PlanStore(tmp_path / "plan.json"))
    assert (tmp_path / "plan.json.corrupt-1").read_text() == "{"


def test_the_micro_batch_is_raised_again_with_care():
    net, _optimizer, guard = built(exact=False, raise_after=3)
    guard.change_plan(Plan().shrunk("test", **{"micro_batch@16": 2}))
    sizes = []
    for step in range(8):
        guard.step(data(step, 0), lambda micro: net(micro).mean())
        sizes.append(guard.micro_batch)
    assert sizes == [2, 2, 2, 4, 4, 4, 8, 8]
    net.where = "forward"
    with memory_limit(6 * PER_SAMPLE):
        guard.step(data(0, 0), lambda micro: net(micro).mean())
    net.where, sizes = "none", []
    for step in range(13):
        guard.step(data(step, 0), lambda micro: net(micro).mean())
        sizes.append(guard.micro_batch)
    assert sizes == [4] * 11 + [8] * 2, "a raise that failed waits four times as long"


def test_grad_scaler_and_clipping_are_those_of_a_plain_loop():
    results = []
    for guarded in (True, False):
        net = Net(False)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        guard = Guard(net, optimizer, micro_batch=8, scaler=scaler, max_grad_norm=0.01) if guarded else None
        failed = []

        def loss_of(micro, net=net, guarded=guarded, failed=failed):
            loss = net(micro).square().mean()
            if guarded and not failed:
                failed.append(1)
                loss.backward()
                raise torch.OutOfMemoryError(TRANSIENT)
            return loss

        for step in range(4):
            if guard:
                guard.step(data(step, 0), loss_of)
                continue
            scaler.scale(loss_of(data(step, 0))).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(net.parameters(), 0.01)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        results.append((weights(net), scaler.get_scale()))
    assert same(results[0][0], results[1][0]) and results[0][1] == results[1][1] == 32.0


class _Engine(torch.nn.Linear):
    pass


def test_a_guard_says_at_the_start_where_it_cannot_work():
    _Engine.__module__ = "deepspeed.runtime.engine"
    net = _Engine(2, 2)
    with pytest.raises(InputError, match="DeepSpeed"):
        Guard(net, torch.optim.SGD(net.parameters()), micro_batch=1)
    stage = torch.nn.Sequential(_Engine(2, 2))
    _Engine.__module__ = "torch.distributed.pipelining.stage"
    with pytest.raises(InputError, match="pipeline"):
        Guard(stage, torch.optim.SGD(stage.parameters()), micro_batch=1)
    _Engine.__module__ = __name__
    net.weight.register_post_accumulate_grad_hook(lambda _parameter: None)
    with pytest.raises(InputError, match="steps in backward"):
        Guard(net, torch.optim.SGD(net.parameters()), micro_batch=1)
    compiled = torch.compile(torch.nn.Linear(2, 2), mode="reduce-overhead")
    with pytest.raises(InputError, match="CUDA graphs"):
        Guard(compiled, torch.optim.SGD(compiled.parameters()), micro_batch=1)
    Guard(torch.compile(torch.nn.Linear(2, 2)), torch.optim.SGD([net.weight]), micro_batch=1)
    for wrong in ({"micro_batch": 0}, {"micro_batch": 1, "votes": "no"}, {"micro_batch": 1, "recompute": "auto"}):
        with pytest.raises(InputError):
            Guard(torch.nn.Linear(2, 2), None, **wrong)
    with pytest.raises(TypeError, match="unexpected"):
        Guard(torch.nn.Linear(2, 2), None, micro_batch=1, mico_batch=2)


def test_batches_of_other_forms():
    _net, _optimizer, guard = built(exact=False)
    with pytest.raises(InputError, match="share dimension 0"):
        guard.step([torch.zeros(2, 3), torch.zeros(3, 3)], lambda micro: None)
