"""The sparse form: gates turned into less computation."""

from decouplify.sparse.model import SparseModel, backend, sparsify
from decouplify.sparse.ops import count_executed_macs
from decouplify.sparse.verification import VerificationReport, verify

__all__ = ["SparseModel", "VerificationReport", "backend", "count_executed_macs", "sparsify", "verify"]
