"""The accountant under the name that earlier pickles and programs have for it."""

from dpcompile.accounting.accountant import PrivacyAccountant
from dpcompile.accounting.calibration import calibrate_noise

__all__ = ["PrivacyAccountant", "calibrate_noise"]
