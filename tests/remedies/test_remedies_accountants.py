"""Accountants of one's own in ``make_private``: what their messages say to do, tried."""

from __future__ import annotations

from typing import Any

from remedies import Right, private, refused, trains

from dpcompile import PrivacyAccountant, calibrate_noise

TARGET: dict[str, Any] = {"noise_multiplier": None, "target_epsilon": 3.0, "target_delta": 1e-4, "epochs": 1}


def counting(**options: Any) -> PrivacyAccountant:
    return PrivacyAccountant(**{"noise_multiplier": 1.0, "sample_rate": 8 / 24, "method": "rdp", **options})


@refused(
    "give noise_multiplier=accountant.noise_multiplier in place of the target; dpcompile.solve and "
    "calibrate_noise find the one of a target",
    ways=2,
    slow=True,
)
def test_an_accountant_and_a_target(told: int) -> Right:
    if told == 2:
        noise = calibrate_noise(target_epsilon=3.0, target_delta=1e-4, sample_rate=8 / 24, steps=3, method="rdp")
        return trains(*private(accountant=counting(noise_multiplier=noise), noise_multiplier=noise))
    counts = counting()
    noise: Any = {"noise_multiplier": counts.noise_multiplier} if told else TARGET
    return trains(*private(accountant=counts, **noise))


@refused("leave relation out, or make the accountant with it", ways=2)
def test_an_accountant_of_another_relation(told: int) -> Right:
    counts = counting(relation="replace_one" if told == 2 else "zero_out", method="pld" if told == 2 else "rdp")
    return trains(*private(accountant=counts, relation=None if told == 1 else "replace_one"))


@refused("make one, PrivacyAccountant(noise_multiplier=..., sample_rate=...), and give it")
def test_an_accountant_that_is_a_class(told: int) -> Right:
    accountant: Any = counting() if told else PrivacyAccountant
    return trains(*private(accountant=accountant))


class Counter:
    """An accountant of one's own, as far as ``whole`` says."""

    def __init__(self, fault: str = "") -> None:
        self.inner, self.fault = counting(), fault
        self.noise_multiplier, self.sample_rate, self.method = 1.0, 8 / 24, "rdp"
        self.relation = "substitute" if fault == "relation" else "zero_out"
        self.epsilon: Any = self.inner.epsilon
        self.move_noise_multiplier: Any = 3 if fault == "idle" else self.inner.move_noise_multiplier

    @property
    def steps(self) -> int:
        return self.inner.steps + (self.fault == "told")

    @property
    def history(self) -> Any:
        if self.fault == "missing":
            raise AttributeError
        return self.inner.history

    def step(self, n: int = 1, *, event: Any = None) -> None:
        if self.fault != "deaf":
            self.inner.step(n)

    def state_dict(self) -> dict[str, Any]:
        return {**self.inner.state_dict(), **({"when": object()} if self.fault == "json" else {})}

    def load_state_dict(self, state: Any) -> None:
        self.inner.load_state_dict(state)


def with_counter(told: int, fault: str) -> Right:
    return trains(*private(accountant=counting() if told == 2 else Counter("" if told else fault)))


@refused("give it what dpcompile.accounting.protocol.Accountant names, or take a PrivacyAccountant", ways=2, slow=True)
def test_an_accountant_that_lacks_something(told: int) -> Right:
    return with_counter(told, "missing")


@refused("give it what dpcompile.accounting.protocol.Accountant names, or take a PrivacyAccountant", ways=2, slow=True)
def test_an_accountant_that_cannot_be_called(told: int) -> Right:
    return with_counter(told, "idle")


@refused("let it be one of 'zero_out', 'add_remove', 'replace_one'")
def test_an_accountant_of_no_relation(told: int) -> Right:
    return with_counter(told, "relation")


@refused("give it what dpcompile.accounting.protocol.Accountant names, or take a PrivacyAccountant", ways=2, slow=True)
def test_an_accountant_whose_state_is_no_json(told: int) -> Right:
    return with_counter(told, "json")


@refused("let all three tell the same steps: what is saved is what is counted after the run goes on")
def test_an_accountant_that_tells_two_numbers(told: int) -> Right:
    return with_counter(told, "told")


@refused("let its step() count every call; the sums of this step were not released")
def test_an_accountant_that_does_not_count(told: int) -> Right:
    return with_counter(told, "deaf")
