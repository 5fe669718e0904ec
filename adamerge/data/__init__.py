"""Where images come from: arrays, folders, data sets of torch and of the Hugging Face hub."""

from adamerge.data.arrays import ArrayImages, Npz
from adamerge.data.base import DataSource, Images, Split, check_data, fetch, labels_of, split_held_out
from adamerge.data.folders import ImageFolders
from adamerge.data.hub import HubData
from adamerge.data.preprocess import Preprocess
from adamerge.data.substituted import Substituted, fetch_readable
from adamerge.data.torch_data import TorchData

__all__ = [
    "ArrayImages",
    "DataSource",
    "HubData",
    "ImageFolders",
    "Images",
    "Npz",
    "Preprocess",
    "Substituted",
    "Split",
    "TorchData",
    "check_data",
    "fetch",
    "fetch_readable",
    "labels_of",
    "split_held_out",
]
