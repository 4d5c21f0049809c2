"""MNIST."""

from torchvision.datasets import MNIST

from lit_compress.datamodules.torchvision_images import TorchvisionDataModule


class MNISTDataModule(TorchvisionDataModule):
    """60,000 handwritten digits of 28×28 grey pixels to train on and 10,000 to test.

    Batch: ``(images (N, 1, 28, 28) float32 in [0, 1], labels (N,) int64)``. Nothing is augmented, and nothing standardised:
    PIBprune wants images that are nearly black and white.

    Args:
        data_dir: Folder that holds ``MNIST/raw``. ``None`` takes ``$LIT_COMPRESS_DATA``, or ``./data`` without it.
        download: Whether to fetch the files when they are not there.
        batch_size: Samples in a batch.
        num_workers: Processes that load data; 0 loads in the main process.
        val_size: Training samples, counted over all digits, held out for validation; 0 leaves validation out.
        train_size: Train on the first so many samples of the shuffled training split only.
        classes: Which digits, e.g. ``[3, 8]``; ``None`` takes all. Labels are renumbered from 0 in the order given.
        seed: Of the validation split. The order of training batches follows torch's global RNG.
        drop_last: Whether training leaves out the last batch when it is not full.

    Raises:
        FileNotFoundError: If the files are missing and ``download`` is off.
        ValueError: If a number is out of range, or a digit is unknown or named twice.

    Source: LeCun et al., *Gradient-Based Learning Applied to Document Recognition*, 1998.

    Example:
        >>> MNISTDataModule(classes=[3, 8]).class_names
        ('3', '8')
    """

    dataset_class = MNIST
    folder = "MNIST/raw"
    all_classes = tuple("0123456789")
    image_shape = (1, 28, 28)
