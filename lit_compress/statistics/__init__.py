"""What a pass over the data leaves of each layer's responses: streaming, exact over ranks, in constant memory."""

from lit_compress.statistics.covariance import StreamingCovariance

__all__ = ["StreamingCovariance"]
