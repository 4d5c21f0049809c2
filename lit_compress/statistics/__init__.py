"""What a pass over the data leaves of each layer's responses: streaming, exact over ranks, in constant memory."""

from lit_compress.statistics.covariance import StreamingCovariance
from lit_compress.statistics.entropies import StreamingEntropies
from lit_compress.statistics.gather import gather_covariances
from lit_compress.statistics.mean import StreamingMean

__all__ = ["StreamingCovariance", "StreamingEntropies", "StreamingMean", "gather_covariances"]
