"""The page of likely wrong labels and of images unlike all others."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from tuning.model.mistakes import CSS, image, picture
from tuning.settings.words import count
from tuning.show.page import note, section, still, text

SHOWN = 60  # likely wrong labels
ODD = 24  # images unlike all others
ISSUES = (
    "By models that were trained without these images another label is at least three times as probable as their own. "
    "Look at each before you change a label: a model can be just as confident when it is wrong, and images may be hard."
)
UNLIKE = (
    "The images whose features are furthest from those of all others, such as another kind of picture. About 1 in 100 "
    "has a distance above 1."
)


WHOLE = ".mistakes .pictures.alone { grid-template-columns: minmax(0, 100%); }\n"  # no map stands beside a picture


def issues_page(
    title: str, table: pd.DataFrame, images: Any, files: Sequence[str], decoded: Any, shaped: Mapping[str, Any]
) -> str:
    """Return the page, in HTML.

    Args:
        table: of `label_issues.run`, the likeliest wrong label first.
        images: of each row of the table, which image it is.
        files: of all images.
        decoded: all images [n, side, side, channels].
        shaped: `fit` and `drop_colour`.
    """

    def figure(place: int, words: str) -> str:
        seen = picture(files[images[place]], np.asarray(decoded[images[place]]), **shaped)
        path = text(table["path"].iloc[place])
        shown = image(seen, str(table["path"].iloc[place]))
        pictures = f'<div class="pictures alone">{shown}</div>'
        return f'<figure>{pictures}<figcaption><p>{words}</p><p class="file">{path}</p></figcaption></figure>'

    issues = np.flatnonzero(table["issue"])
    wrong = [
        figure(
            place,
            f"{text(table['label'].iloc[place])} ({table['own'].iloc[place]:.1%}), rather "
            f"<b>{text(table['suggested'].iloc[place])}</b> ({table['probability'].iloc[place]:.1%})",
        )
        for place in issues[:SHOWN]
    ]
    first = table[~table["path"].duplicated()]
    odd = first["unlike_others"].sort_values(ascending=False, kind="stable").index[:ODD]
    unlike = [figure(place, f"{table['unlike_others'].iloc[place]:.1f}") for place in odd]
    summary = f"{len(issues):,} labels of {count(len(first), 'image')} are likely to be wrong"
    more = f"; the {len(wrong)} likeliest are shown" if len(wrong) < len(issues) else ""
    return still(
        f"{title}: labels",
        [
            f"<header><h1>{text(title)}: labels</h1><p>{text(summary + more)}.</p></header>",
            section("labels", "Likely wrong labels", note(ISSUES), f'<div class="mistakes">{"".join(wrong)}</div>'),
            section("odd", "Images unlike all others", note(UNLIKE), f'<div class="mistakes">{"".join(unlike)}</div>'),
        ],
        CSS + WHOLE,
    )
