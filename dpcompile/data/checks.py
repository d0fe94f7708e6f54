"""What the loader refuses: data that cannot be Poisson sampled, and optimizers that assume otherwise."""

from __future__ import annotations

import math
import warnings
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler

from dpcompile.accounting.arguments import number
from dpcompile.accounting.by_step import RateSchedule
from dpcompile.accounting.truncation import no_bound_of_parts
from dpcompile.data.rate import SamplingRate
from dpcompile.data.repeated import refuse_repeated
from dpcompile.data.users import Users
from dpcompile.errors import PrivacyError
from dpcompile.module import Engine
from dpcompile.optim.checks import refuse_other_rate
from dpcompile.optim.correlated import refuse_other_parts
from dpcompile.optim.optimizer import DPOptimizer
from dpcompile.optim.state_checks import LOADER, refuse_malformed

__all__ = [
    "DrawsUsed",
    "check_cap",
    "check_count",
    "check_rank",
    "checked_size",
    "refuse_cap_by_step",
    "refuse_lone_replicas",
    "refuse_other_optimizer",
    "refuse_other_users",
    "refuse_same_examples",
    "refuse_state",
    "refuse_unattached_schedule",
    "refuse_uneven_parts",
    "saved_sizes",
    "taken_over",
    "turns_of",
    "users_of",
]

_TAKEN_OVER = (
    "collate_fn",
    "num_workers",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "prefetch_factor",
    "persistent_workers",
)


def checked_size(dataset: Any) -> int:
    """Length of a map-style dataset with at least one example."""
    missing = [name for name in ("__len__", "__getitem__") if not hasattr(dataset, name)]
    if isinstance(dataset, IterableDataset) or missing:
        why = f"has no {missing[0]}" if missing else "is iterable"
        raise PrivacyError(
            f"the dataset {type(dataset).__name__} {why}: its examples cannot be drawn independently",
            remedy="take a map-style dataset (with __getitem__ and __len__)",
        )
    if not len(dataset):
        raise PrivacyError("the dataset is empty", remedy="give a dataset with at least one example")
    return len(dataset)


def check_count(name: str, value: Any) -> None:
    """An integer, 1 or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise PrivacyError(f"{name} is {value!r}", remedy="give an integer, 1 or more")


def check_cap(max_batch_size: Any, bands: int) -> None:
    """A count or None; not with parts."""
    if max_batch_size is None:
        return
    if max_batch_size == "auto":
        raise PrivacyError(
            "max_batch_size is 'auto', and a loader does not know what a cap would cost",
            remedy="give make_private a DataLoader and max_batch_size='auto', or give the loader a number",
        )
    check_count("max_batch_size", max_batch_size)
    if bands > 1:
        raise no_bound_of_parts(max_batch_size, bands)


def refuse_cap_by_step(noise_schedule: Any, sizes: Any) -> None:
    """A cap of "auto" is compared for equal steps."""
    if noise_schedule is not None or sizes is not None:
        raise PrivacyError(
            "max_batch_size is 'auto', and noise or batch size go by the step: what a cap costs is compared for equal "
            "steps",
            remedy="give max_batch_size a number, or leave it out",
        )


def taken_over(loader: DataLoader[Any]) -> dict[str, Any]:
    """Arguments for a PoissonLoader that stands in for ``loader``.

    ``drop_last`` means nothing here, for no draw is a last part; ``in_order`` neither, for draws come in order. The
    generator is passed over with a warning.

    Raises:
        PrivacyError: it has another sampler than torch's sequential one or the shuffling one without replacement.
    """
    checked_size(loader.dataset)
    if loader.generator is not None:
        warnings.warn(
            "the DataLoader's generator has no part in private draws: they are a function of seed= of make_private or "
            "PoissonLoader, and secret",
            UserWarning,
            stacklevel=3,
        )
    batch_sampler = loader.batch_sampler
    if type(batch_sampler) is not BatchSampler:
        raise _other_sampler(batch_sampler if batch_sampler is not None else loader.sampler, "batch sampler")
    sampler: Any = batch_sampler.sampler
    shuffles = type(sampler) is RandomSampler and not sampler.replacement
    if type(sampler) is not SequentialSampler and not (shuffles and sampler.num_samples == len(sampler.data_source)):
        raise _other_sampler(sampler, "sampler")
    options = {name: getattr(loader, name) for name in _TAKEN_OVER}
    return {"dataset": loader.dataset, "expected_batch_size": batch_sampler.batch_size, **options}


def turns_of(size: int, expected_batch_size: Any, bands: int, sample_rate: Any) -> int:
    """In how many steps each example has its turn."""
    if bands != 1 or sample_rate is not None:
        given = "sample_rate" if bands == 1 else "bands"
        raise PrivacyError(
            f"in_turn, and {given}: each example comes once in a pass, as many steps as batches fit into the dataset",
            remedy=f"leave {given} out and give expected_batch_size, or leave in_turn out",
        )
    if expected_batch_size is None or not 0 < number(expected_batch_size) <= size:
        raise PrivacyError(
            f"in_turn, and an expected_batch_size of {expected_batch_size!r}, not in (0, {size}]",
            remedy="give the mean number of examples in a step",
        )
    return math.ceil(size / number(expected_batch_size))


def users_of(dataset: Any, groups: Any, examples_per_user: int | None) -> Users | None:
    """Whose examples are whose; None without groups."""
    if groups is None and examples_per_user is None:
        refuse_repeated(dataset)
        return None
    if groups is None or examples_per_user is None:
        given, missing = ("examples_per_user", "groups") if groups is None else ("groups", "examples_per_user")
        raise PrivacyError(
            f"{given} without {missing}",
            remedy="give groups, whose each example of the dataset is, and examples_per_user, how many rows a user has "
            "in a batch; or neither, where every example is drawn by itself",
        )
    users = Users(groups, checked_size(dataset), examples_per_user)
    refuse_repeated(dataset, users.of_examples)
    return users


def refuse_other_users(engine: Engine, examples_per_user: int) -> None:
    """The model clips what the loader draws: users of as many rows, or single examples."""
    clips = engine.options.examples_per_user
    if clips != examples_per_user:
        raise PrivacyError(
            f"the loader gives {examples_per_user} row(s) of each that it draws, and the model clips the gradient of "
            f"{clips} row(s) at a time: noise and epsilon would be for something else",
            remedy="give dp_compile and PoissonLoader the same examples_per_user (1 without groups), or groups and "
            "examples_per_user to make_private",
        )


def refuse_other_optimizer(engine: Engine, optimizer: Any, loader: Any) -> None:
    """The optimizer adds noise, to this model, and divides and accounts for what the loader draws."""
    if not isinstance(optimizer, DPOptimizer):
        raise PrivacyError(
            f"the optimizer is a {type(optimizer).__name__}, which adds no noise",
            remedy="wrap it in a DPOptimizer and attach that",
        )
    if optimizer.engine is not engine:
        raise PrivacyError(
            "the optimizer was made for another model", remedy="make the DPOptimizer with the model that is trained"
        )
    first = loader.expected_batch_size if loader.schedule is None else loader.schedule.expected_batch_size(0)
    if optimizer.expected_batch_size not in (first, loader.expected_batch_size):
        raise PrivacyError(
            f"the loader draws {loader.expected_batch_size} examples on average, the optimizer divides by "
            f"{optimizer.expected_batch_size}",
            remedy="give both the same expected_batch_size",
        )
    refuse_other_rate(optimizer.accountant, loader)
    refuse_other_parts(optimizer.mechanism, loader.bands)


def check_rank(rank: int, world_size: int) -> None:
    """A rank is one of ``world_size``."""
    if not (isinstance(rank, int) and isinstance(world_size, int) and 0 <= rank < world_size):
        raise PrivacyError(
            f"rank {rank!r} is not one of {world_size!r} ranks",
            remedy="give rank=torch.distributed.get_rank() and world_size=torch.distributed.get_world_size()",
        )


def refuse_same_examples(loader: int, ranks: int) -> None:
    """The ranks' gradients add up: an example that all of them draw would count once for each."""
    if loader != ranks:
        raise PrivacyError(
            f"the loader deals each logical batch out to {loader} rank(s), and there are {ranks}: ranks would train on "
            "the same examples, and each example would count several times",
            remedy="give PoissonLoader rank=torch.distributed.get_rank() and "
            "world_size=torch.distributed.get_world_size()",
        )


def refuse_lone_replicas(world_size: int) -> None:
    """Ranks that share a logical batch must add up its clipped sums; those of an ordinary model are not."""
    raise PrivacyError(
        f"the loader deals each logical batch out to {world_size} ranks, and nothing adds up the ranks' gradients: "
        "every rank would train a model of its own on a part of it",
        remedy="wrap the model, DistributedDataParallel(dp_compile(model)), and give that to DPOptimizer and attach; "
        "or call fully_shard before dp_compile; or leave out rank and world_size to train on each rank by itself",
    )


def refuse_uneven_parts(ranks: Sequence[int], world_size: int) -> None:
    """Each part of a logical batch is taken, and as often as the others."""
    taken = Counter(ranks)
    if set(taken) != set(range(world_size)) or len(set(taken.values())) != 1:
        raise PrivacyError(
            f"the ranks take the parts {', '.join(map(str, ranks))} of {world_size} of each logical batch: some "
            "examples would count several times, and others not at all",
            remedy="give PoissonLoader rank=torch.distributed.get_rank(), which differs from rank to rank on all nodes",
        )


def refuse_unattached_schedule(schedule: RateSchedule | None) -> None:
    """Draws of a rate each are counted by what knows which draw a step is on."""
    if schedule is not None:
        raise PrivacyError(
            "the batch size is a function of the step, and batches() gives draws to a loop of its own: nothing would "
            "tell the optimizer which rate to count, and what to divide by",
            remedy="attach the loader, as make_private does, and iterate over it or over loader.parts(); or give "
            "expected_batch_size a number",
        )


def saved_sizes(rate: SamplingRate, steps: int) -> float | dict[str, Any]:
    """Of the state of a loader: the expected batch size, or what tells those of so many steps.

    It is no number then: a version that knows nothing of schedules must not go on with a constant.
    """
    return rate.expected_batch_size if rate.schedule is None else rate.schedule.state(steps)


def _refuse_other_schedule(saved: Any, schedule: RateSchedule | None) -> None:
    by_step = isinstance(saved, Mapping)
    if by_step == (schedule is not None) and (schedule is None or schedule.is_of(saved)):
        return
    if by_step and schedule is not None:
        what = f"is another function of the step than in the saved run, in its first {saved.get('steps')} steps"
    else:
        kinds = "a function of the step", "a number"
        what = f"was {kinds[not by_step]} in the saved run and is {kinds[by_step]} here"
    raise PrivacyError(
        f"expected_batch_size, or sample_rate, {what}: the draws would differ",
        remedy="make the PoissonLoader with the same expected_batch_size and sample_rate",
    )


def refuse_state(saved: Any, current: Any, schedule: RateSchedule | None = None) -> None:
    """A state to resume from means the same draws, and goes on where none has been used.

    Args:
        saved: the state.
        current: of the loader that is to load it.
        schedule: of that loader.
    """
    refuse_malformed(saved, LOADER, "PoissonLoader")
    # Of loaders before there were parts, users and caps:
    saved = {"bands": 1, "examples_per_user": 1, "groups": 0, "max_batch_size": None, **saved}
    if saved["groups"] != current["groups"]:
        raise PrivacyError(
            "groups say of other examples that they are one user's than in the saved run: the draws would differ",
            remedy="make the PoissonLoader with the same dataset and groups",
        )
    names = ["dataset_size", "secure", "bands", "examples_per_user", "max_batch_size"]
    if schedule is not None or isinstance(saved["expected_batch_size"], Mapping):
        _refuse_other_schedule(saved["expected_batch_size"], schedule)
    else:
        names.insert(1, "expected_batch_size")
    for name in names:
        if saved[name] != current[name]:
            raise PrivacyError(
                f"{name} was {saved[name]} in the saved run and is {current[name]} here: the draws would differ",
                remedy=f"make the PoissonLoader with the same {name}",
            )
    size = saved["expected_batch_size"] if schedule is None else schedule.expected_batch_size(0)
    rate = saved.get("sample_rate", size / max(saved["dataset_size"], 1))
    if not isinstance(rate, float) or not math.isclose(rate, current["sample_rate"], rel_tol=1e-9):
        raise PrivacyError(
            f"sample_rate was {rate} in the saved run and is {current['sample_rate']} here: the draws would differ",
            remedy="make the PoissonLoader with the same sample_rate",
        )
    if saved["seed"] == current["seed"] and saved["step"] < current["step"]:
        raise PrivacyError(
            f"the state dict stands at logical step {saved['step']}, this loader at {current['step']} of the same "
            "seed: draws would be used twice",
            remedy="resume from the latest state, or make a new PoissonLoader with another seed",
        )


class DrawsUsed:
    """Which logical steps of which seed trained which model, in this process.

    A second loader with the same seed gives the same draws; composition counts draws that are independent.
    """

    def __init__(self) -> None:
        self._steps: WeakKeyDictionary[nn.Module, dict[int, tuple[weakref.ref[Any], int]]] = WeakKeyDictionary()

    def note(self, module: nn.Module, loader: Any) -> None:
        """The draws before ``loader.step`` were handed out to this model."""
        self._steps.setdefault(module, {})[loader.seed] = weakref.ref(loader), loader.step

    def check(self, module: nn.Module, loader: Any) -> None:
        """Raise PrivacyError if another loader has handed the next draw of this one out to the same model."""
        owner, step = self._steps.get(module, {}).get(loader.seed, (None, 0))
        if owner is not None and owner() is not loader and loader.step < step:
            raise PrivacyError(
                f"this model was trained on draws {loader.step} to {step - 1} of the same seed already: the same draws "
                "would be counted as new ones",
                remedy="leave the seed out or give another one; to go on with a run, load the loader's state_dict",
            )


def _other_sampler(sampler: Any, what: str) -> PrivacyError:
    return PrivacyError(
        f"the DataLoader's {what} is {type(sampler).__name__}: it does not sample as the accountant assumes",
        remedy="pass a DataLoader with torch's default sampler (shuffle=True or False) or a PoissonLoader",
    )
