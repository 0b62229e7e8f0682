"""`fastres explain`: models by name, and one sentence for what it cannot run."""

import pytest

from fastres import cli

BAD = {
    "--model os:getcwd": "--model os:getcwd: it returns str, expected torch.nn.Module",
    "--model resnet5": "--model resnet5: there is no such model; did you mean resnet50?",
    "--model nope": "--model nope: there is no such model; there are resnet18, ",
    "--model /nowhere/net.py:f": "--model /nowhere/net.py:f: there is no file /nowhere/net.py",
    "--batch 0": "--batch 0: expected 1 or more",
    "--image-size -3": "--image-size -3: expected 1 or more",
    "--channels 0": "--channels 0: expected 1 or more",
    "--model resnet18 --channels 1": "resnet18 cannot run these settings: ",
    "--model resnet18 --image-size 32 --batch 1": "resnet18 cannot run these settings: Expected more",
    "--model torch.nn:Identity --batch 99999999999": "torch.nn:Identity cannot run these settings: ",
    "--model torch.nn:TransformerEncoderLayer": "building it raised TypeError: ",
    "--model torch.nn:Bilinear": "building it raised TypeError: ",
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_arguments_get_one_sentence(arguments, capsys):
    assert cli.main(["explain", *arguments.split()]) == 2
    printed = capsys.readouterr()
    assert BAD[arguments] in printed.err and len(printed.err.splitlines()) == 1
    assert printed.err.startswith("fastres explain: ") and not printed.out


def test_a_model_of_another_image_size(timm, capsys):
    assert cli.main("explain --model timm:vit_tiny_patch16_224 --image-size 64".split()) == 2
    assert "cannot run these settings: Input height (64) doesn't match" in capsys.readouterr().err


def test_others_models_are_fused_first(timm, torchvision, capsys):
    for name in ("torchvision:resnet18", "timm:resnet18", "transformers:resnet-18"):
        assert cli.main(f"explain --model {name} --image-size 32".split()) == 0
        assert "conv_bn_add_relu" in capsys.readouterr().out


def test_options_of_a_number_say_what_it_is(capsys):
    with pytest.raises(SystemExit):
        cli.main(["explain", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--batch BATCH images " in text and "--image-size IMAGE_SIZE side of the images" in text


def test_a_model_that_ends_the_process(tmp_path, capsys):
    lines = [
        "from torch import nn",
        "class Ends(nn.Module):",
        "    def forward(self, x):",
        "        raise SystemExit",
    ]
    (tmp_path / "ends.py").write_text("\n".join(lines))
    assert cli.main(["explain", "--model", f"{tmp_path}/ends.py:Ends"]) != 0
    assert "cannot run these settings" in capsys.readouterr().err
