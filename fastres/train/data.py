"""Images to train on: scikit-learn's digits, or a folder with one folder of images a class."""

import hashlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset, default_collate

_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


class DataError(ValueError):
    """The data cannot be trained on; the message says why."""


@dataclass
class Data:
    """Two data sets that share no image, of (image: (C, H, W) float32, label) pairs.

    Attributes:
        description: for people.
        fingerprint: equal for equal images, labels and split, wherever they lie.
    """

    train: Dataset
    test: Dataset
    classes: list[str]
    channels: int
    description: str
    fingerprint: str


def digits() -> Data:
    """1,797 handwritten digits of 8x8 pixels, part of scikit-learn; a fixed fifth of each is held out.

    Reference: Alpaydin and Kaynak 1998, the test set of UCI's "Optical Recognition of Handwritten Digits".
    """
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 16
    labels = torch.from_numpy(labels).long()
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    for label in range(10):
        (members,) = torch.where(labels == label)
        chosen = torch.randperm(len(members), generator=generator)[: len(members) // 5]
        held_out[members[chosen]] = True
    mean, std = images[~held_out].mean(), images[~held_out].std()
    images = (images - mean) / std
    # Two pixels an original one: a network of three stages then ends at 4x4 and not at 2x2.
    images = torch.nn.functional.interpolate(images, scale_factor=2, mode="bilinear", align_corners=False)
    train, test = (TensorDataset(images[part], labels[part]) for part in (~held_out, held_out))
    return Data(train, test, [str(label) for label in range(10)], 1, "scikit-learn's digits", "digits")


class ImageFolder(Dataset):
    """Image files with their labels; decoded, resized and cropped when asked for.

    Args:
        files: (path, label) pairs.
        size: side of the square that is returned.

    An index gives the image's centre. (index, seed) gives a random crop, flipped or not, which depends on
    the seed alone and so not on the worker that reads the image.
    """

    MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's

    def __init__(self, files: list[tuple[Path, int]], size: int) -> None:
        self.files, self.size = files, size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[Tensor, int]:
        index, seed = index if isinstance(index, tuple) else (index, None)
        path, label = self.files[index]
        return self._read(path, None if seed is None else torch.Generator().manual_seed(seed)), label

    def _read(self, path: Path, augmentation: torch.Generator | None) -> Tensor:
        import numpy
        from PIL import Image

        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except Exception as error:  # Pillow's decoders raise whatever the broken bytes lead them to
            raise DataError(f"{path} is no image that can be read: {error}") from error
        shorter = round(self.size * 256 / 224)
        scale = shorter / min(image.size)
        width, height = (max(self.size, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        if augmentation is not None:
            left = int(torch.randint(width - self.size + 1, (), generator=augmentation))
            top = int(torch.randint(height - self.size + 1, (), generator=augmentation))
        else:
            left, top = (width - self.size) // 2, (height - self.size) // 2
        image = image.crop((left, top, left + self.size, top + self.size))
        pixels = torch.from_numpy(numpy.array(image)).permute(2, 0, 1).float() / 255
        if augmentation is not None and torch.rand((), generator=augmentation) < 0.5:
            pixels = pixels.flip(2)
        return (pixels - torch.tensor(self.MEAN).view(3, 1, 1)) / torch.tensor(self.STD).view(3, 1, 1)


def image_folder(root: Path, size: int) -> Data:
    """Folders of images, one a class, below `root`/train and `root`/val, or below `root` itself.

    What is held out may also be called valid, validation or test. In the last case it is a fifth of each
    class, the same one each time.

    Raises:
        DataError: no such folder, or it has fewer than two classes, or a class without images.
    """
    if not root.is_dir():
        raise DataError(f"--data {root}: there is no such folder")
    names = ("val", "valid", "validation", "test")
    held_out_root = next((root / name for name in names if (root / name).is_dir()), None)
    if (root / "train").is_dir() and held_out_root is not None:
        train, classes = _files(root / "train")
        test, test_classes = _files(held_out_root)
        if test_classes != classes:
            raise DataError(f"--data {root}: train and {held_out_root.name} have different classes")
    else:
        files, classes = _files(root)
        train, test = [], []
        for label in range(len(classes)):
            members = [file for file in files if file[1] == label]
            order = torch.randperm(len(members), generator=torch.Generator().manual_seed(0)).tolist()
            count = max(1, len(members) // 5)
            test += [members[i] for i in order[:count]]
            train += [members[i] for i in order[count:]]
    return Data(
        ImageFolder(train, size),
        ImageFolder(test, size),
        classes,
        3,
        str(root),
        _fingerprint(root, size, train, test),
    )


def batches_of(
    dataset: Dataset, batch_size: int, workers: int, sampler: Sampler | list | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of images and labels.

    Raises:
        DataError: an image is broken; the same error with workers as without.
    """
    # A worker's exception would arrive as a text that holds its traceback: so it is handed over as a value.
    loader = DataLoader(
        _Guarded(dataset),
        batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=_leave_signals_to_the_parent,
    )
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        yield batch


class _Guarded(Dataset):
    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index):
        try:
            return self.dataset[index]
        except DataError as error:
            return error


def _collate(samples: list):
    return next((s for s in samples if isinstance(s, DataError)), None) or default_collate(samples)


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C goes to every process of the terminal; the parent ends its workers itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _fingerprint(root: Path, size: int, *parts: list[tuple[Path, int]]) -> str:
    """Of the files' names, sizes and labels."""
    found = hashlib.sha256(str(size).encode())
    for files in parts:
        found.update(b"\0")
        for path, label in files:
            try:
                file_size = path.stat().st_size
            except OSError as error:  # such as a link that leads nowhere
                raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
            found.update(f"{path.relative_to(root)}\0{file_size}\0{label}\n".encode())
    return found.hexdigest()


def _files(root: Path) -> tuple[list[tuple[Path, int]], list[str]]:
    folders = [path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")]
    classes = sorted(path.name for path in folders)
    if len(classes) < 2:
        raise DataError(f"{root} has {_count(len(classes), 'folder')}, expected at least two, one a class")
    files = []
    for label, name in enumerate(classes):
        members = sorted(path for path in (root / name).rglob("[!.]*") if path.suffix.lower() in _SUFFIXES)
        if len(members) < 2:
            raise DataError(f"{root / name} has {_count(len(members), 'image')}, expected at least two")
        files += [(path, label) for path in members]
    return files, classes


def _count(number: int, noun: str) -> str:
    return f"1 {noun}" if number == 1 else f"{number or 'no'} {noun}s"


def shifted(images: Tensor, generator: torch.Generator, pixels: int = 2) -> Tensor:
    """Each image moved by up to `pixels` in each direction, its border repeated: (N, C, H, W) to the same.

    Reference: the random crop of a padded image, He et al. 2015, section 4.2, for a whole batch at once.
    """
    count, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (pixels,) * 4, mode="replicate")
    rows, columns = torch.randint(0, 2 * pixels + 1, (2, count, 1), generator=generator)
    rows = (rows + torch.arange(height))[:, None, :, None]
    columns = (columns + torch.arange(width))[:, None, None, :]
    return padded[
        torch.arange(count)[:, None, None, None], torch.arange(images.size(1))[:, None, None], rows, columns
    ]
