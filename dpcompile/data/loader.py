"""The loader: Poisson-sampled logical batches, in physical batches of one size with masks.

Sources: Abadi et al. 2016, section 2.2 (Poisson sampling); Chua et al., "Scalable DP-SGD: Shuffling vs. Poisson
Subsampling" (NeurIPS 2024), for fixed physical sizes with masks, and why shuffled batches do not have the same epsilon.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from dpcompile.accounting.arguments import check_bands
from dpcompile.accounting.by_step import RateSchedule
from dpcompile.accounting.truncation import Truncation
from dpcompile.batches.draws import Draws
from dpcompile.batches.matching import DrawnBatch
from dpcompile.data import checks
from dpcompile.data.cyclic import CyclicBatches
from dpcompile.data.padding import Collated, PaddedCollate, RequestedExamples, rows_of
from dpcompile.data.rate import SamplingRate
from dpcompile.data.same_examples import refuse_other_examples
from dpcompile.data.sampling import PoissonBatches, default_physical_batch_size
from dpcompile.data.users import UserBatches
from dpcompile.distributed.ranks import digest, from_first, gathered, refuse_disagreement
from dpcompile.errors import PrivacyError
from dpcompile.module import Engine, engine_of
from dpcompile.noise.counter import Stream, check_seed, fresh_seed
from dpcompile.noise.normal import uniform
from dpcompile.optim.optimizer import DPOptimizer
from dpcompile.runtime.masks import of_users

__all__ = ["PhysicalBatch", "PoissonLoader"]


_USED = checks.DrawsUsed()


@dataclass(frozen=True, slots=True)
class PhysicalBatch:
    """Part of a logical batch, of the loader's physical size.

    Attributes:
        data: what the dataset and ``collate_fn`` make of ``physical_batch_size`` examples.
        mask: bool ``[physical_batch_size]``, on the CPU; False for padding.
        ends_step: it is the last of its logical step.
    """

    data: Any
    mask: Tensor
    ends_step: bool


class PoissonLoader:
    """Batches in which each example is, independently, with probability ``sample_rate``.

    Iterating needs :meth:`attach` (`make_private` does it) and gives every logical batch whole, as the dataset has it,
    so that the ordinary loop is right, and a framework's: one batch is a step, and ``len(loader)`` of them are a pass.
    A draw larger than the physical batch runs in several forwards behind one call (:mod:`dpcompile.runtime.turns`).
    :meth:`parts` gives the physical batches one by one, for a loop that should not hold a draw's outputs at once, and
    :meth:`batches` gives them with masks for loops of one's own, without attaching.

    With ``max_batch_size`` a larger draw is truncated, at random, and every step has as many physical batches.

    Args:
        dataset: map-style, with a length.
        expected_batch_size: mean size of a logical batch, and what divides its sum: a constant, or a function of the
            logical step (:attr:`step`, from 0 on) that does not look at the data. Draw t is then of its own size and
            rate, whenever it is taken, counted as such, and divided by its own; not with ``bands``.
        sample_rate: the chance of each example, a constant or such a function; None: ``expected_batch_size /
            len(dataset)``. With both given, nothing here depends on the size of the dataset, as
            ``relation="add_remove"`` asks for (:class:`dpcompile.PrivacyAccountant`); they should fit together about.
        physical_batch_size: examples per forward, padding included; a larger draw takes several. None: the expected
            size plus two standard deviations, up to a multiple of 8, at most ``len(dataset)``; with ``max_batch_size``
            that cap in equal parts, as few as are at most one and a half times as large. Of batch sizes by the step:
            for the largest of a pass.
        max_batch_size: the cap: of a larger draw, of all ranks together, so many examples are kept, a uniform subset.
            Steps then take ``ceil(max_batch_size / (world_size * physical_batch_size))`` physical batches each, however
            many examples were drawn, also none: what they run on has one size. Steps cost more, the more the lower the
            cap (:func:`dpcompile.accounting.events.truncated`), and the accountant must be told, with
            ``truncation=loader.truncation``. Not with ``bands``. None: every draw whole.
        bands: of a mechanism whose noise is correlated over so many steps: examples are dealt out to as many parts, by
            the seed, and step t draws from part t mod ``bands`` alone, at the rate ``bands * expected_batch_size /
            len(dataset)`` (:mod:`dpcompile.data.cyclic`). A given ``sample_rate`` is that rate. 1: no parts.
        in_turn: each example once in a pass, always in the same step of it: ``bands`` and ``steps`` are then as many as
            a pass of ``expected_batch_size`` has, and ``sample_rate`` is 1. For noise in a tree
            (:mod:`dpcompile.noise.tree`) or by buffers, which needs no sampling.
        groups: whose each example is, in the order of the dataset: numbers or names. Users are drawn then in the place
            of examples, each with ``sample_rate``; every size here counts users (``len(dataset)`` above is how many
            there are), and epsilon is for all that a user has. None: every example is drawn by itself.
        examples_per_user: with ``groups``: rows that a user has in a batch, one after the other, as
            ``dp_compile(examples_per_user=)`` takes them (:class:`dpcompile.data.users.Users`).
        steps: logical steps in one pass; None: so many that an example is drawn once on average, rounded up. Of batch
            sizes by the step as many as it takes from step 0 on, for every pass.
        seed: of the draws, a secret like the noise's; it may be the same one. None draws one.
        secure: draw with ChaCha20.
        collate_fn: as in DataLoader. It is called with drawn examples only, and once with one of them a second time.
        padding_example: an item that fills up; None: zeros, and the smallest drawn one of numbers such as lengths. Give
            one where that makes the model return NaN (an attention mask without a single position, say).
        num_workers: as in DataLoader; so are the rest.
        pin_memory: as in DataLoader.
        timeout: as in DataLoader.
        worker_init_fn: as in DataLoader.
        multiprocessing_context: as in DataLoader.
        prefetch_factor: as in DataLoader.
        persistent_workers: as in DataLoader.
        rank: of this process among those that share a logical batch: each takes a part, in as many physical batches.
        world_size: how many they are. Every rank has the same seed (rank 0's if none is given) and the whole dataset.

    Attributes:
        step: the next logical step to be drawn. It only grows: no draw is handed out twice.
        sample_rate: the chance of each example in the next step, with ``bands`` in the steps of its part.
        expected_batch_size: of the next step.
        schedule: both, of every step; None: they are constants.
        bands: how many parts it draws from by turns.
        from_size: whether rate or expected batch size come from the size of the dataset.
        in_turn: whether each example comes once in a pass.
        users: whose examples are whose; None without ``groups``.
        truncation: size of the dataset and cap, for the accountant; None: draws are whole.

    Raises:
        PrivacyError: sizes that are not positive, a rate that is none, an expected batch larger than the dataset (or
            its part), an empty or an iterable dataset.

    **Guarantee.** The logical batches are independent Poisson samples of rate ``sample_rate``, each handed out once,
    with ``bands`` of one part each, so that no example is in two of ``bands`` steps in a row, with ``max_batch_size``
    truncated to a uniform subset (:func:`dpcompile.data.sampling.kept`), with ``groups`` of users, whose rows are
    theirs alone; what fills them up has mask False. Attached, the model knows the mask of each by its tensors, uses
    each once, and the optimizer steps once for each draw (:class:`dpcompile.batches.draws.Draws`).

    ================================================  ====================================================
    edge case                                         outcome
    ================================================  ====================================================
    a batch size by the step, and draws left out      the others keep their numbers, sizes and rates
    ... that is not in its range at some step         refused before that draw, the step named
    ... and :meth:`batches`                           refused: one rate would be counted for all
    nothing drawn                                     one physical batch, all padding
    a draw larger than the physical batch             several forwards, one step
    a draw smaller than ``max_batch_size``            padded up to it, also by physical batches without an example
    ... and how long it takes to load, or how long    not hidden by ``max_batch_size``: give all examples one shape
    its padded sequences are
    ``break`` inside a pass                           the next ``for`` goes on with new draws, a whole pass
    ``break`` between two parts of one draw           the draw is dropped whole, its sums discarded
    the optimizer is not stepped after a draw         the next backward is refused: two draws would add up
    batches taken some ahead (a prefetcher)           right
    a pass taken whole before any is used (``list``)  refused
    a batch used twice, or none of the loader's       refused
    ``load_state_dict`` inside a pass                 the first ``for`` has the rest of that pass
    ``load_state_dict`` of an earlier step            refused: draws would be used twice
    two iterations at once                            the older one is refused
    a second loader of the same seed on one model     refused where its draws were used already
    ``bands`` that are not the mechanism's            refused
    ``groups``, and a model of single examples        refused
    ``groups``, and rows computed or moved in a loop  refused: they could be another user's
    ``bands``, and the dataset reordered on the way   not seen: examples move to other parts
    ================================================  ====================================================
    """

    def __init__(
        self,
        dataset: Any,
        *,
        expected_batch_size: float | Callable[[int], float] | None = None,
        sample_rate: float | Callable[[int], float] | None = None,
        bands: int = 1,
        in_turn: bool | None = None,
        groups: Any = None,
        examples_per_user: int | None = None,
        physical_batch_size: int | None = None,
        max_batch_size: int | None = None,
        steps: int | None = None,
        seed: int | None = None,
        secure: bool = False,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        padding_example: Any = None,
        num_workers: int = 0,
        pin_memory: bool = False,
        timeout: float = 0,
        worker_init_fn: Callable[[int], None] | None = None,
        multiprocessing_context: Any = None,
        prefetch_factor: int | None = None,
        persistent_workers: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        checks.check_rank(rank, world_size)
        self.users = checks.users_of(dataset, groups, examples_per_user)
        size = checks.checked_size(dataset) if self.users is None else self.users.count
        if in_turn:
            bands, sample_rate = checks.turns_of(size, expected_batch_size, bands, sample_rate), 1.0
        check_bands(bands, "zero_out")
        checks.check_cap(max_batch_size, bands)
        rate = SamplingRate.given(size, expected_batch_size, sample_rate, steps, bands, max_batch_size)
        checks.check_count("steps", rate.steps)
        if physical_batch_size is None:
            cap = None if max_batch_size is None else -(-max_batch_size // world_size)
            physical_batch_size = default_physical_batch_size(rate.largest * size / bands / world_size, size, cap)
        checks.check_count("physical_batch_size", physical_batch_size)
        drawn = fresh_seed(secure=secure)
        if world_size > 1:  # also where a seed is given: ranks that wait for one that others do not send hang
            drawn = from_first(drawn)
        self.seed = drawn if seed is None else seed
        self.rank, self.world_size = rank, world_size
        self._agreed = world_size == 1
        check_seed(self.seed, secure=secure)
        self.dataset, self.collate_fn, self.padding_example = dataset, collate_fn or default_collate, padding_example
        self.physical_batch_size = physical_batch_size
        self._rate, self.from_size = rate, rate.from_size or bool(in_turn)
        self.secure, self.bands, self.in_turn = secure, bands, bool(in_turn)
        self.step = 0
        self._length = rate.steps
        self._position = 0  # logical steps of the current pass that have been handed out
        self._resumes = False
        self._attached: tuple[Engine, DPOptimizer, Draws] | None = None
        self._iteration = object()
        self._finished = True  # whether the last pass was taken whole
        self._sampler = (PoissonBatches if bands == 1 else partial(CyclicBatches, bands=bands))(
            seed=self.seed,
            size=size,
            sample_rate=rate.sample_rate if rate.schedule is None else rate.schedule.sample_rate,
            physical_batch_size=physical_batch_size,
            secure=secure,
            rank=rank,
            world_size=world_size,
            max_batch_size=max_batch_size,
        )
        self._worker_seeds = torch.Generator()
        self._loader: DataLoader[Any] = DataLoader(
            RequestedExamples(dataset, padding_example),  # type: ignore[arg-type]
            batch_sampler=self._sampler if self.users is None else UserBatches(self._sampler, self.users),  # type: ignore[arg-type]
            collate_fn=PaddedCollate(self.collate_fn, padding_example),  # type: ignore[arg-type]
            num_workers=num_workers,
            pin_memory=pin_memory,
            timeout=timeout,
            worker_init_fn=worker_init_fn,
            multiprocessing_context=multiprocessing_context,
            generator=self._worker_seeds,
            prefetch_factor=prefetch_factor,
            persistent_workers=persistent_workers,
        )

    @classmethod
    def from_dataloader(
        cls,
        loader: DataLoader[Any],
        *,
        expected_batch_size: float | Callable[[int], float] | None = None,
        physical_batch_size: int | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> PoissonLoader:
        """The same dataset, collation and workers, Poisson sampled.

        Args:
            loader: with torch's own sampler, shuffling or not.
            expected_batch_size: None: the loader's batch size.
            physical_batch_size: see the class.
            seed: see the class.
            **options: further arguments of the class; they win over the loader's.

        Raises:
            PrivacyError: a sampler of another kind, or an iterable dataset: the accountant's epsilon is not theirs.
        """
        taken = checks.taken_over(loader)
        if expected_batch_size is not None:
            taken["expected_batch_size"] = expected_batch_size
        return cls(**{**taken, "physical_batch_size": physical_batch_size, "seed": seed, **options})

    def attach(self, model: nn.Module, optimizer: DPOptimizer) -> PoissonLoader:
        """Let the model know what is padding in each batch, and the optimizer when a logical step is whole.

        Returns:
            The loader itself.

        Raises:
            PrivacyError: another kind of optimizer or one for another model, or one that divides or accounts for
                another batch size or relation than this loader draws for.
        """
        engine = engine_of(model)
        checks.refuse_other_optimizer(engine, optimizer, self)
        checks.refuse_other_users(engine, self.examples_per_user)
        if engine.distributed:
            checks.refuse_same_examples(self.world_size, engine.data_ranks)
        elif self.world_size > 1:
            checks.refuse_lone_replicas(self.world_size)
        if engine.ledger.deliveries:  # of batches that are no draw of this loader
            optimizer.discard()
        optimizer.fed_by(self)
        assert engine.feed is not None
        self._attached = (engine, optimizer, engine.feed.draws)
        return self

    @property
    def schedule(self) -> RateSchedule | None:
        """Rate and expected batch size of every step; None: they are constants."""
        return self._rate.schedule

    @property
    def sample_rate(self) -> float:
        """Of the next step: see the class."""
        return self._rate.sample_rate if self.schedule is None else self.schedule.sample_rate(self.step)

    @property
    def expected_batch_size(self) -> float:
        """Of the next step."""
        return self._rate.expected_batch_size if self.schedule is None else self.schedule.expected_batch_size(self.step)

    @property
    def dataset_size(self) -> int:
        """How many examples, or users, are drawn from."""
        return self._sampler.size

    @property
    def max_batch_size(self) -> int | None:
        """The cap on draws, that likewise stays."""
        return self._sampler.max_batch_size

    @property
    def examples_per_user(self) -> int:
        """Rows that a user has in a batch; 1 without ``groups``."""
        return 1 if self.users is None else self.users.examples_per_user

    @property
    def truncation(self) -> Truncation | None:
        """What an accountant must know of the cap: see the class."""
        return None if self.max_batch_size is None else (self.dataset_size, self.max_batch_size)

    def __len__(self) -> int:
        """Logical steps of one pass, and batches that iterating over it gives."""
        return self._length

    def __iter__(self) -> Iterator[Any]:
        """One pass, a batch for each logical step; see :meth:`attach`."""
        return self._feed(whole=True)

    def parts(self) -> Iterator[Any]:
        """One pass in batches of the physical size; the optimizer waits until a draw is complete.

        For models whose outputs for a whole draw do not fit into memory (a language model's logits), and at the cost of
        one forward less for draws that need several.
        """
        return self._feed(whole=False)

    def batches(self) -> Iterator[PhysicalBatch]:
        """One pass in physical batches with their masks, for loops that hand the mask on and step after ``ends_step``.

        ``dpcompile.set_mask(model, batch.mask)`` before the model is called hands it on, and
        ``optimizer.accumulating = not batch.ends_step`` lets the optimizer wait.

        Raises:
            PrivacyError: a batch size by the step.
        """
        checks.refuse_unattached_schedule(self.schedule)
        self._agree()
        return (
            PhysicalBatch(data, of_users(mask, self.examples_per_user), r.ends_step)
            for data, mask, _, r in self._run(self._begin(), whole=False)
        )

    def _agree(self) -> None:
        """Before the first pass, and the first after a checkpoint, compare with the other ranks."""
        if not self._agreed:
            state = self.state_dict()
            del state["seed"]
            refuse_disagreement(
                {"seed": digest(self.seed), **state, "physical_batch_size": self.physical_batch_size}
                | {"world_size": self.world_size, "steps": len(self)}
            )
            checks.refuse_uneven_parts(gathered(self.rank), self.world_size)
            if self.world_size > 1:
                refuse_other_examples(self.dataset, len(self.dataset))
            self._agreed = True

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` takes. It holds the seed: keep it as secret as the data."""
        return {
            "seed": self.seed,
            "secure": self.secure,
            "step": self.step,
            "position": self._position,
            "dataset_size": self.dataset_size,
            "expected_batch_size": checks.saved_sizes(self._rate, max(len(self), self.step)),
            "sample_rate": self._rate.sample_rate,
            "bands": self.bands,
            "examples_per_user": self.examples_per_user,
            "groups": 0 if self.users is None else self.users.digest,
            "max_batch_size": self.max_batch_size,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where the saved loader was; the first pass is the rest of the one it was in.

        Raises:
            PrivacyError: another dataset size, batch size, rate, cap or generator; or an earlier step of the same seed.
        """
        checks.refuse_state(state_dict, self.state_dict(), self.schedule)
        self.seed = self._sampler.seed = state_dict["seed"]
        self.step, self._position = state_dict["step"], state_dict["position"] % len(self)
        self._resumes, self._agreed = True, self.world_size == 1
        self._iteration = object()

    def __repr__(self) -> str:
        return (
            f"PoissonLoader(dataset_size={self.dataset_size}, expected_batch_size={self._rate.sizes}, "
            f"physical_batch_size={self.physical_batch_size}, "
            + ("" if self.max_batch_size is None else f"max_batch_size={self.max_batch_size}, ")
            + f"steps={len(self)}, step={self.step})"
        )

    def _begin(self) -> object:
        """Start a pass; it becomes the only one that may go on."""
        if not self._resumes:
            self._position = 0
        self._resumes = False
        self._iteration = object()
        return self._iteration

    def _run(self, iteration: object, *, whole: bool) -> Iterator[Collated]:
        self._finished = False
        self._sampler.cover(range(self.step, self.step + len(self) - self._position), whole=whole)
        value = uniform(self.seed, step=self.step, stream=Stream.WORKERS, numel=1, start=self.rank, secure=self.secure)
        self._worker_seeds.manual_seed(int(value.item() * 2**53))
        for batch in self._loader:
            if iteration is not self._iteration:
                raise PrivacyError(
                    "another pass over the same loader has begun, or a state was loaded, inside this one",
                    remedy="finish one loop before starting the next",
                )
            if batch.request.starts_step:  # counted when handed out: a draw that was seen is never drawn again
                self.step = batch.request.step + 1
                self._position = (self._position + 1) % len(self)
            yield batch
        self._finished = True

    def _feed(self, *, whole: bool) -> Iterator[Any]:
        if self._attached is None:
            return _unattached()
        engine, optimizer, draws = self._attached
        self._agree()
        _USED.check(engine.module, self)
        optimizer.begin_pass()
        if not self._finished:  # part of a draw is no Poisson sample: one example more moves another out of it
            draws.new_pass()
            optimizer.discard()
        return self._handed_out(engine.module, draws, self._begin(), whole)

    def _handed_out(self, module: nn.Module, draws: Draws, iteration: object, whole: bool) -> Iterator[Any]:
        count = 0
        for data, mask, dims, request in self._run(iteration, whole=whole):
            rows = [(t, d) for t, d in zip(rows_of(data), dims, strict=True) if d >= 0]
            turns = -(-len(mask) // (self.physical_batch_size * self.examples_per_user))
            place = (request.step, request.part, request.parts, iteration)
            draws.hand_out(DrawnBatch(rows, mask, turns, *place, of_users=self.users is not None))
            count += request.starts_step
            _USED.note(module, self)
            yield data
        if count > 1 and draws.unused(iteration):
            raise PrivacyError(
                f"the whole pass, {count} draws, was taken out of the loader before any of it was used",
                remedy="iterate over the loader itself, not over list(loader); a prefetcher may be some batches ahead; "
                "to look at draws without training iterate over loader.batches()",
            )


def _unattached() -> Iterator[Any]:
    """Raises at the first batch: frameworks make an iterator before they attach, to see that there is one."""
    raise PrivacyError(
        "the loader is not attached: nothing would tell the model which examples are padding",
        remedy="call loader.attach(model, optimizer), as make_private does, or iterate over loader.batches()",
    )
    yield  # a generator
