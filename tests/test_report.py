"""The profile's page, in the browser that people would open it with."""

import errno
import json
import re
from pathlib import Path

import pytest

from fastres.cli import main
from fastres.profiler.advice import advice
from fastres.profiler.result import Profile

PROFILE = Path(__file__).with_name("profile.json")


@pytest.fixture
def profile() -> Profile:
    return Profile.read(PROFILE)


@pytest.fixture
def opened(browser, profile, tmp_path):
    """opened(...) is the page of the profile. At the end, nothing must have gone wrong in it."""
    pages, wrong, asked = [], [], []

    def open_page(width=1280, height=900, **settings):
        path = tmp_path / "report.html"
        profile.to_html(path)
        page = browser.new_page(viewport={"width": width, "height": height}, **settings)
        pages.append(page)
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: (wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_selector("#memory .main-svg")
        return page

    yield open_page
    assert pages and not wrong
    assert set(asked) == {(tmp_path / "report.html").as_uri()}
    for page in pages:
        page.close()


def texts(page, column: int) -> list[str]:
    return page.locator(f"table tbody tr td:nth-child({column + 1})").all_text_contents()


def heading(page, title: str):
    return page.locator("th button", has_text=re.compile(f"^{re.escape(title)}$"))


def column_of(page, title: str) -> int:
    return page.locator("th button").all_text_contents().index(title)


def test_a_bar_for_each_block_and_variant(opened, profile):
    page = opened()
    bars = page.locator("#blocks .bars .point path")
    assert bars.count() == 2 * len(profile.data["blocks"])
    assert page.locator("#blocks .errorbar").count() == bars.count()


def test_bars_have_the_blocks_times(opened, profile):
    page = opened()
    shown = page.evaluate("document.getElementById('blocks').data.map((trace) => trace.x)")
    for variant, times in zip(("fused", "stock"), shown, strict=True):
        for block, time_ in zip(profile.data["blocks"], times, strict=True):
            rows = [row.by_round(variant) for row in profile.rows if row.block == block["name"]]
            by_round = sorted(sum(seconds) for seconds in zip(*rows, strict=True))
            assert time_ == pytest.approx(by_round[len(by_round) // 2] * 1e3)


def test_the_bars_of_one_direction_can_be_chosen(opened):
    page = opened()
    read = "document.getElementById('blocks').data[0].x"
    both = page.evaluate(read)
    found = {}
    for name in ("forward", "backward"):
        page.get_by_role("button", name=name, exact=True).click()
        assert page.locator("[aria-pressed=true]").all_text_contents() == [name]
        found[name] = page.evaluate(read)
    assert all(f < b for f, b in zip(found["forward"], both, strict=True))
    assert found["forward"] != found["backward"]


def test_a_point_on_the_roofline_for_each_op_that_computes(opened, profile):
    page = opened()
    computing = sum(row.data["flops"][d] > 0 for row in profile.rows for d in row.directions)
    assert computing > 20
    assert page.locator("#roofline .points path.point").count() == computing
    assert page.locator("#roofline .lines path.js-line").count() == len(profile.limits.copy)


def test_memory_lines_and_the_backward_marks(opened):
    page = opened()
    assert page.locator("#memory .lines path.js-line").count() == 2
    assert page.locator("#memory .shapelayer path").count() == 2


def test_the_table_has_each_op_and_begins_with_what_loses_most(opened, profile):
    page = opened()
    lost = [float(text) for text in texts(page, column_of(page, "lost ms"))]
    assert len(lost) == len(profile.rows) and lost == sorted(lost, reverse=True)


@pytest.mark.parametrize("press", ["click", "Enter", "Space"])
def test_a_press_on_a_title_sorts(opened, press):
    page = opened()
    button, column = heading(page, "stock ms"), column_of(page, "stock ms")

    def sort() -> list[float]:
        if press == "click":
            button.click()
        else:
            button.focus()
            page.keyboard.press(press)
        return [float(text) for text in texts(page, column)]

    falling, rising = sort(), sort()
    assert falling == sorted(falling, reverse=True) and rising == sorted(rising) and rising != falling
    assert page.locator("[aria-sort]").evaluate_all("all => all.map((th) => th.ariaSort)") == ["ascending"]


def test_text_sorts_by_its_numbers_too(opened):
    page = opened()
    heading(page, "block").click()
    blocks = list(dict.fromkeys(texts(page, 0)))
    assert blocks == sorted(blocks) and "layer1.0" in blocks
    assert page.locator("th").first.get_attribute("aria-sort") == "ascending"


def test_light_and_dark(opened):
    ground, bars = [], []
    page = opened(color_scheme="light")
    for scheme in ("light", "dark", "light"):
        page.emulate_media(color_scheme=scheme)
        page.wait_for_timeout(300)
        ground.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        bars.append(page.locator("#blocks .bars path").first.evaluate("e => getComputedStyle(e).fill"))
    assert ground[0] == ground[2] == "rgb(255, 255, 255)" and ground[1] != ground[0]
    assert bars[0] == bars[2] != bars[1]


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_nothing_overflows_sideways(opened, width):
    page = opened(width=width)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    plots = page.locator(".js-plotly-plot").evaluate_all("all => all.map((e) => e.offsetWidth)")
    assert len(plots) == 3 and all(width / 2 < plot < width for plot in plots)


def test_printed(opened, tmp_path):
    page = opened(color_scheme="dark")
    page.pdf(path=tmp_path / "report.pdf", prefer_css_page_size=True)
    written = (tmp_path / "report.pdf").read_bytes()
    assert written.startswith(b"%PDF") and 2 <= len(re.findall(rb"/Type\s*/Page\b", written)) <= 12
    # It was white for the paper, and is dark again on the screen.
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"


def test_hostile_text_is_only_text(opened, profile):
    hostile = "<script>alert(1)</script><img src=http://x.invalid/ onerror=alert(2)>${x}</title>"
    profile.data["settings"]["model"] = hostile
    profile.data["blocks"][0]["name"] = hostile
    profile.data["blocks"][1]["ops"][0].update(fused=False, reason=hostile)
    profile.data["advice"].append(hostile)
    limits = profile.data["limits"]
    for kind in limits.values():
        kind[hostile] = kind[next(iter(kind))]
    page = opened()
    assert hostile in page.locator("h1").text_content()
    assert hostile in page.title()
    assert hostile in texts(page, 0)
    assert f"stock: {hostile}" in texts(page, 2)
    assert page.locator("p", has_text="Copies reach").text_content().count(hostile) == len(limits)


@pytest.mark.parametrize("factor, word", [(0.5, "slower"), (2.0, "faster")])
def test_the_headline_says_faster_and_slower_alike(opened, profile, factor, word):
    profile.data["whole_step"]["stock"] = [t * factor for t in profile.data["whole_step"]["fused"]]
    page = opened()
    assert page.locator(".headline b").first.text_content() == f"2.00× {word}"


def test_the_headline_says_within_the_noise_as_the_advice_does(opened, profile):
    fused = profile.data["whole_step"]["fused"] = [1.0, 1.0, 1.0]
    profile.data["whole_step"]["stock"] = [t * f for t, f in zip(fused, (0.8, 1.05, 1.3), strict=True)]
    page = opened()
    assert page.locator(".headline b").first.text_content() == "As fast"
    assert advice(profile)[0].startswith("Fused is as fast as stock, within the noise")


@pytest.mark.parametrize("stock", [2.0, 0.5])
def test_too_few_rounds_are_not_called_faster_or_slower(opened, profile, stock):
    profile.data["whole_step"] = {"fused": [1.0, 1.0], "stock": [stock, stock]}
    profile.data["profiled_step"] = profile.data["whole_step"]
    page = opened()
    words = f"{stock:.2f}× as fast as stock (the noise of 2 rounds is not known), {stock:.2f} to"
    assert page.locator(".headline div").first.text_content().startswith(words)
    assert advice(profile)[0] == (
        f"Fused is {stock:.2f}x as fast as stock; the noise of 2 rounds is not known."
    )


def test_the_table_says_what_pytorch_saw(opened, profile):
    profile.data["blocks"][0]["ops"][0]["called"]["fused"] = {
        "forward": ["a::b"],
        "backward": ["a::b", "c::d"],
    }
    page = opened()
    assert "a::b, c::d" in texts(page, column_of(page, "PyTorch saw"))


def test_without_a_backward_pass(opened, profile):
    for block in profile.data["blocks"]:
        for op in block["ops"]:
            for name in ("flops", "bytes", "stock_traffic", "bound"):
                del op[name]["backward"]
            for times in op["seconds"].values():
                del times["backward"]
            del op["saved_bytes"]
    profile.data["memory_marks"] = {}
    page = opened()
    assert page.locator("#blocks .bars .point path").count() == 2 * len(profile.data["blocks"])
    titles = page.locator("th button").all_text_contents()
    assert "forward ms" in titles and "backward ms" not in titles and "MB kept" not in titles


# ---------------------------------------------------------------------------------------------------------
# the command


def test_the_command_makes_a_page_of_a_kept_profile(tmp_path, capsys):
    path = tmp_path / "report.html"
    assert main(["profile", "--from", str(PROFILE), "--html", str(path)]) == 0
    assert "cifar_resnet20" in capsys.readouterr().out
    assert path.read_text().startswith("<!doctype html>")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("target", ["", "missing/report.html"])
def test_the_command_says_where_it_cannot_write(tmp_path, capsys, target):
    assert main(["profile", "--from", str(PROFILE), "--html", str(tmp_path / target)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastres profile: --html") and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["json", "html"])
def test_the_command_leaves_the_profile_that_it_reads(tmp_path, monkeypatch, capsys, option):
    (tmp_path / "p.json").write_bytes(PROFILE.read_bytes())
    monkeypatch.chdir(tmp_path)
    assert main(["profile", "--from", "p.json", f"--{option}", str(tmp_path / "p.json")]) == 2
    assert "two of them are one file" in capsys.readouterr().err
    assert (tmp_path / "p.json").read_bytes() == PROFILE.read_bytes()


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"fastres_profile": 999}', "\x00\xff"])
def test_the_command_refuses_what_is_no_profile(tmp_path, capsys, content):
    path = tmp_path / "p.json"
    path.write_text(content)
    assert main(["profile", "--from", str(path)]) == 2
    assert re.match(rf"fastres profile: {re.escape(str(path))}: is ", capsys.readouterr().err)


def test_a_trace_cannot_be_made_of_a_kept_profile(tmp_path, capsys):
    assert main(["profile", "--from", str(PROFILE), "--trace", str(tmp_path / "t.json")]) == 2
    assert "--from" in capsys.readouterr().err


def test_a_failure_half_way_leaves_the_old_page(profile, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        profile.to_html(path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_the_fixture_is_what_this_version_writes(profile):
    """So that the tests above are about pages that people get."""
    import torch

    import fastres

    model = fastres.models.cifar_resnet20().to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)
    now = json.loads(json.dumps(fastres.profile(model, images, repeat=1).data))

    def form(value):
        if isinstance(value, dict):
            return {key: form(part) for key, part in value.items()}
        return [form(value[0])] if isinstance(value, list) and value else type(value).__name__

    assert form(now["blocks"][1]) == form(profile.data["blocks"][1])
    assert now.keys() == profile.data.keys() and now["settings"].keys() == profile.data["settings"].keys()
