"""The images that are trained on: digits, folders, what is wrong with them."""

import shutil

import pytest
import torch
from training import SETTINGS, weights

from fastres import cli
from fastres.train import data, loop


def test_digits_are_real_and_the_held_out_ones_are_never_trained_on():
    digits = data.digits()
    assert len(digits.train) + len(digits.test) == 1797
    train, test = (
        {image.numpy().tobytes() for image in part.tensors[0]} for part in (digits.train, digits.test)
    )
    assert not train & test
    counts = torch.bincount(digits.test.tensors[1], minlength=10)
    assert counts.min() >= 34 and len(digits.test) == counts.sum()
    again = data.digits()
    assert torch.equal(again.test.tensors[0], digits.test.tensors[0])


def test_shifted_moves_each_image_by_itself_and_at_most_so_far():
    images = torch.zeros(64, 1, 9, 9)
    images[:, :, 4, 4] = 1
    moved = data.shifted(images, torch.Generator().manual_seed(0), pixels=2)
    assert moved.shape == images.shape and torch.equal(moved.sum((1, 2, 3)), torch.ones(64))
    rows, columns = moved[:, 0].flatten(1).argmax(1) // 9, moved[:, 0].flatten(1).argmax(1) % 9
    assert set(rows.tolist()) == set(columns.tolist()) == {2, 3, 4, 5, 6}


def test_folder_of_images(folder_of_images):
    images = data.image_folder(folder_of_images, 32)
    assert images.classes == ["cat", "dog"] and len(images.train) == 16 and len(images.test) == 4
    assert not {path for path, _ in images.train.files} & {path for path, _ in images.test.files}
    image, label = images.train[0, 7]
    assert image.shape == (3, 32, 32) and label in (0, 1)
    assert torch.equal(images.test[1][0], images.test[1][0]), "held-out images are not augmented"
    crops = [images.train[0, seed][0] for seed in (7, 7, 8, 9)]
    assert torch.equal(crops[0], crops[1]) and not all(torch.equal(crops[0], crop) for crop in crops[2:])
    for part in ("train", "val"):
        (folder_of_images / part).mkdir()
        for name in ("cat", "dog"):
            target = folder_of_images / part / name
            target.mkdir()
            for path in list((folder_of_images / name).iterdir())[: 4 if part == "val" else 6]:
                path.rename(target / path.name)
    images = data.image_folder(folder_of_images, 32)
    assert (len(images.train), len(images.test)) == (12, 8)


def test_trains_on_a_folder_of_images(folder_of_images, tmp_path, capsys):
    arguments = (
        f"train --data {folder_of_images} --image-size 32 --epochs 1 --batch-size 8 --out {tmp_path}/run"
    )
    assert cli.main(arguments.split()) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("held-out accuracy ")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", ["cut short", "no header", "empty"])
def test_broken_image_is_named(damage, workers, folder_of_images, tmp_path, capsys):
    path = folder_of_images / "cat" / "3.png"
    whole = path.read_bytes()
    path.write_bytes({"cut short": whole[: len(whole) // 2], "no header": whole[9:], "empty": b""}[damage])
    arguments = f"train --data {folder_of_images} --workers {workers} --epochs 1 --out {tmp_path}/run"
    assert cli.main(arguments.split()) == 2
    error = capsys.readouterr().err
    assert f"{path} is no image that can be read" in error and len(error.splitlines()) == 1


def test_weights_do_not_depend_on_the_number_of_workers(folder_of_images, tmp_path):
    results = []
    for workers in (0, 1, 2):
        settings = loop.Settings(**SETTINGS | dict(epochs=1, batch_size=4), workers=workers)
        run = loop.Run(settings, data.image_folder(folder_of_images, 32), tmp_path / "run")
        run.train()
        results.append(weights(run))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_one_is_not_counted_in_the_plural(folder_of_images, tmp_path, capsys):
    def refusal():
        assert cli.main(f"train --data {folder_of_images} --out {tmp_path}/run".split()) == 2
        return capsys.readouterr().err

    for path in list((folder_of_images / "cat").iterdir())[1:]:
        path.unlink()
    assert "cat has 1 image, expected at least two" in refusal()
    for path in (folder_of_images / "cat").iterdir():
        path.unlink()
    assert "cat has no images, expected at least two" in refusal()
    (folder_of_images / "cat").rmdir()
    assert f"{folder_of_images} has 1 folder, expected at least two, one a class" in refusal()


def test_what_is_held_out_has_several_names(folder_of_images, tmp_path):
    for name in ("val", "valid", "validation", "test"):
        root = tmp_path / name
        (root / "train").mkdir(parents=True)
        for part in ("train", name):
            shutil.copytree(folder_of_images, root / part, dirs_exist_ok=True)
        assert data.image_folder(root, 32).classes == ["cat", "dog"]


def test_hidden_files_are_none_of_the_images(folder_of_images):
    (folder_of_images / ".ipynb_checkpoints").mkdir()
    (folder_of_images / "cat" / "._0.png").write_bytes(b"no image")
    images = data.image_folder(folder_of_images, 32)
    assert images.classes == ["cat", "dog"] and len(images.train) + len(images.test) == 20


def test_a_fingerprint_is_of_the_images_and_not_of_their_place(folder_of_images, tmp_path):
    def fingerprint(root, size=32):
        return data.image_folder(root, size).fingerprint

    copied = shutil.copytree(folder_of_images, tmp_path / "copied")
    assert fingerprint(copied) == fingerprint(folder_of_images) != fingerprint(folder_of_images, 48)
    shutil.copy(copied / "cat" / "0.png", copied / "cat" / "more.png")
    assert fingerprint(copied) != fingerprint(folder_of_images)


def test_a_link_that_leads_nowhere_is_named(folder_of_images, tmp_path, capsys):
    link = next(path for path in folder_of_images.rglob("*") if path.is_dir()) / "broken.png"
    link.symlink_to(tmp_path / "nowhere.png")
    assert cli.main(["train", "--data", str(folder_of_images), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert str(link) in error and "No such file" in error and error.count("\n") == 1
