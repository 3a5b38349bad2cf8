"""What every explorer has to do when it is walked through."""


def check_sweep(explorer, least, most=None, pixels=True):
    """A sweep reaches that many different states, none of them NaN, and ends where it began.

    pixels: whether the picture is compared as well; where limits of axes change, they are laid out anew.
    """
    before, picture = repr(explorer), explorer.png()
    summaries = explorer.sweep()
    assert least <= len(set(summaries)) <= (most or len(summaries))
    assert not any("nan" in summary for summary in summaries)
    assert repr(explorer) == before and (not pixels or explorer.png() == picture)
    assert len(explorer.alt) > 40 and all(control.description for control in explorer.controls.values())
