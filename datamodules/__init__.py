"""Data modules: everything a Trainer needs of a set, and ``analysis_dataloader()`` for the statistics that pruning rests on."""

from lit_compress.datamodules.caltech import CaltechPedestrianDataModule
from lit_compress.datamodules.cifar import CIFAR10DataModule, CIFAR100DataModule
from lit_compress.datamodules.coco_pedestrians import CocoPedestrianDataModule
from lit_compress.datamodules.digits import DigitsDataModule
from lit_compress.datamodules.image_patches import ImagePatchDataModule
from lit_compress.datamodules.imagenet import ImageNetDataModule
from lit_compress.datamodules.mnist import MNISTDataModule
from lit_compress.datamodules.pedestrian_images import PedestrianDataModule
from lit_compress.datamodules.pedestrian_patches import PedestrianPatchDataModule
from lit_compress.datamodules.penn_fudan import PennFudanDataModule
from lit_compress.datamodules.proposed_pedestrians import ProposedPedestrianDataModule
from lit_compress.datamodules.rotated_mnist import RotatedMNISTDataModule
from lit_compress.datamodules.segmentation import SegmentationDataModule
from lit_compress.datamodules.synthetic_pedestrians import SyntheticPedestrianDataModule
from lit_compress.datamodules.tao import TAODataModule
from lit_compress.datamodules.teacher_cache import TeacherCacheDataModule

__all__ = [
    "CIFAR10DataModule",
    "CIFAR100DataModule",
    "CaltechPedestrianDataModule",
    "CocoPedestrianDataModule",
    "DigitsDataModule",
    "ImageNetDataModule",
    "ImagePatchDataModule",
    "MNISTDataModule",
    "PedestrianDataModule",
    "PedestrianPatchDataModule",
    "PennFudanDataModule",
    "ProposedPedestrianDataModule",
    "RotatedMNISTDataModule",
    "SegmentationDataModule",
    "SyntheticPedestrianDataModule",
    "TAODataModule",
    "TeacherCacheDataModule",
]
