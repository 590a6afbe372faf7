"""Real English text without a dataset download: an encyclopedia and news, from the test data of the `gensim` package.

    pip install --no-deps gensim
    python examples/texts.py DIRECTORY

writes `calibration.txt` (every other encyclopedia article), `encyclopedia.txt` (the articles between them) and `news.txt`
(another source, other subjects). The encyclopedia is an excerpt of Wikipedia (CC BY-SA), the news is the Lee corpus of ABC
news mails; both are used for measuring only and are not part of this repository.
"""

from __future__ import annotations

import argparse
import bz2
import html
import importlib.util
import re
from pathlib import Path

ENCYCLOPEDIA = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
NEWS = "lee_background.cor"
SHORTEST_ARTICLE = 2000


def encyclopedia_articles(dump: str) -> list[str]:
    """Plain text of the articles of a MediaWiki dump, stubs and redirects left out."""
    texts = re.findall(r"<text[^>]*>(.*?)</text>", dump, re.DOTALL)
    articles = [strip_markup(html.unescape(text)) for text in texts if not text.startswith("#REDIRECT")]
    return [article for article in articles if len(article) >= SHORTEST_ARTICLE]


def strip_markup(text: str) -> str:
    """Wiki markup -> readable text: no templates, tables, references, link targets or headings' equals signs."""
    text = re.sub(r"<!--.*?-->|<ref[^>]*/>|<ref.*?</ref>|<math.*?</math>", "", text, flags=re.DOTALL)
    for _ in range(6):  # templates nest
        text = re.sub(r"\{\{[^{}]*\}\}|\{\|[^{}]*?\|\}", "", text, flags=re.DOTALL)
    text = re.sub(
        r"\[\[(?:File|Image|Category|[a-z\-]{2,12}):[^\[\]]*(?:\[\[[^\]]*\]\][^\[\]]*)*\]\]", "", text
    )
    text = re.sub(r"\[\[(?:[^|\]]*\|)?([^\]]*)\]\]", r"\1", text)
    text = re.sub(r"\[https?:\S+ ?([^\]]*)\]", r"\1", text)
    text = re.sub(r"<[^>]+>|'{2,}|^=+|=+\s*$|^[*:#;]+ ?", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def write_texts(directory: Path) -> None:
    """Write the three files; ImportError tells what to install."""
    found = importlib.util.find_spec("gensim")
    if found is None or found.origin is None:
        raise ImportError("the texts come with the gensim package: pip install --no-deps gensim")
    data = Path(found.origin).parent / "test" / "test_data"
    articles = encyclopedia_articles(
        bz2.decompress((data / ENCYCLOPEDIA).read_bytes()).decode("utf-8", "ignore")
    )
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "calibration.txt").write_text("\n\n".join(articles[0::2]), encoding="utf-8")
    (directory / "encyclopedia.txt").write_text("\n\n".join(articles[1::2]), encoding="utf-8")
    (directory / "news.txt").write_text((data / NEWS).read_text(encoding="utf-8"), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    write_texts(parser.parse_args().directory)
