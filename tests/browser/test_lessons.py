"""Every lesson in a real JupyterLab: Run All has no error, and its first live picture follows a dragged slider."""

from pathlib import Path

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install qlearn[test])")
expect = sync_api.expect

LESSONS = sorted(path.name for path in (Path(__file__).resolve().parents[2] / "lessons").glob("*.ipynb"))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", LESSONS)
def test_run_all_and_drag(lab, name):
    lab.open(f"lessons/{name}").run_all()
    assert lab.failures() == []
    expect(lab.broken_widgets()).to_have_count(0)
    assert hidden_code(lab) == []
    areas, has = lab.notebook.locator(".jp-OutputArea"), lab.page.locator
    output = areas.filter(has=has(".qlive-note")).filter(has=has(".noUi-target")).first
    target, note = output.locator(".noUi-target").first, output.locator(".qlive-note")
    before, said = shown(output), note.inner_text()
    lab.drag(target, to=0.0 if position(target) > 0.5 else 1.0)
    expect(note).not_to_have_text(said, timeout=60_000)
    expect(note).not_to_contain_text("this takes a few seconds", timeout=60_000)
    assert shown(output) != before


def hidden_code(lab):
    """The first lines of code cells that are wider than the page: by default JupyterLab does not wrap them."""
    return lab.notebook.locator(".jp-CodeCell .cm-scroller").evaluate_all(
        "all => all.filter(e => e.scrollWidth > e.clientWidth).map(e => e.innerText.slice(0, 80))"
    )


def position(target):
    """Where the handle of a slider is, from 0 to 1."""
    track, handle = target.bounding_box(), target.locator(".noUi-handle").first.bounding_box()
    return (handle["x"] + handle["width"] / 2 - track["x"]) / track["width"]


def shown(output):
    """What a live widget shows: its pictures, pixel by pixel, and its text other than the note."""
    return output.evaluate(
        """async output => {
            const parts = [...output.querySelectorAll('.qtext')].map(text => text.innerText);
            for (const image of output.querySelectorAll('img')) {
                await image.decode();
                const canvas = document.createElement('canvas');
                canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
                canvas.getContext('2d').drawImage(image, 0, 0);
                parts.push(canvas.toDataURL());
            }
            return parts.join();
        }"""
    )
