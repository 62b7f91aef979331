"""Build the storyteller's corpus from two public collections of public-domain books.

    python corpus.py --classic-books classic-books-markdown --gutenberg Gutenberg_Text --output corpus

Both folders are clones of GitHub repositories that keep one folder for each author:

* `mlschmitt/classic-books-markdown` at commit 9448827 (`AUTHOR/TITLE.md`)
* `rcdm-uga/Gutenberg_Text` at commit a0b16d3 (`AUTHOR/TITLE.txt`)

Three sets of books come out: fairy tales and children's books (`fairy.json`), other fiction (`fiction.json`)
and a few fairy-tale books that training never sees (`held_out.json`, and as plain text `held_out.txt`). Each
JSON file is a list of `[name, [paragraph, ...]]`; beside it stands a plain list of the names (`books-*.txt`).
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

# Books from this year on may still be protected in the United States.
FIRST_PROTECTED_YEAR = 1929
# A book of the collection that states no year is an old one.
YEAR_IF_UNSTATED = 1900
# The year stands in the heading of a file: no need to read more than this many characters of it.
HEADING_LENGTH = 600

# The names of the books carry whatever is left of a title after these two.
UNUSUAL_IN_NAMES = re.compile(r"[^\w .,'()&\[\]-]+")
LONGEST_TITLE = 150

SHORTEST_PARAGRAPH = 3
# Short lines ("Yes, sir.") recur in any book; a longer paragraph that recurs is another edition of a story.
LONGEST_REPEATABLE_PARAGRAPH = 60
# What is not longer than this is a stray leaf, or a book of which an earlier edition took every paragraph.
FEWEST_PARAGRAPHS = 16
PROSE_PUNCTUATION = frozenset(" ,.;:'\"!?-")
# Tables, sums and foreign scripts fall below this share of letters and plain punctuation.
LEAST_SHARE_OF_PROSE = 0.93


def any_of(*alternatives: str, flags: re.RegexFlag = re.NOFLAG) -> re.Pattern[str]:
    """Compile a pattern that finds any of the alternatives; each may itself be several, set apart by `|`."""
    return re.compile("|".join(alternatives), flags)


# Names are AUTHOR__TITLE. In the Markdown collection the start of the name decides, by and large author by
# author; in the larger collection whatever occurs anywhere in it.
FAIRY_CLASSICS = any_of(
    r"Aesop",
    r"Beatrix Potter",
    r"Carlo Collodi",
    r"Edith Nesbit",
    r"Frances Hodgson Burnett__(A Little|The Secret)",
    r"George MacDonald",
    r"Hans Christian",
    r"Howard Pyle",
    r"Hugh Lofting",
    r"J\. M\. Barrie",
    r"James Stephens__Irish",
    r"Johanna Spyri",
    r"Kenneth Grahame",
    r"L\. Frank Baum",
    r"Lewis Carroll",
    r"Robert Louis Stevenson__Treasure",
    r"Rudyard Kipling__(The Jungle|Just)",
    r"The Brothers Grimm",
    r"Anna Sewell",
    r"Eleanor",
    r"Jack London",
    r"Lucy Maud",
    r"Mark Twain__(The Adv|The Prince)",
)
FAIRY_GUTENBERG = any_of(
    r"fairy",
    r"Andersen, H\. C.*(Tale|Stor|Ice|Greeting|Sand)",
    r"Baum, L\. Frank",
    r"^Grimm",
    r"^Alcott.*(Little|Flower|Lulu|Jack|Under|Eight|Scrap|Old-Fash|Candy|Garland|Proverb|Rose)",
    r"Carroll.*(Alice|Looking)",
    r"Barrie.*Peter",
    r"Burnett.*(Princess|Garden|Faunt|Racketty|Queen|Stor)",
    r"Kipling.*(Jungle|Just So|Puck)",
    r"Lang.*(Fairy|Book of|Prince|Animal|Romance)",
    r"Potter, Beatrix",
    r"^Alger",
    flags=re.IGNORECASE,
)
# Other works of the same authors that are no stories in prose.
NO_STORIES = any_of(
    r"Poem|Letters|Vocabulary|Index|Drama|Play|Romance$|Dictionary|History of",
    r"Myth, Ritual|Custom|Magic and|Homer|Odyssey|Iliad|Ballad|Social|Essays",
    r"Comic Trag|Her Life|Yarn",
    flags=re.IGNORECASE,
)
# What the Markdown collection holds besides prose fiction: philosophy, science, scripture, verse and plays.
NO_FICTION = any_of(
    r"Plato|Aristotle|Spinoza|Descartes|Kant|Hume|Nietzsche|Darwin|Adam Smith",
    r"Malthus|Marx|Freud|Euclid|Shakespeare|Milton|Dante|Homer|Ovid|Virgil",
    r"Whitman|Tozer|Renan|Laozi|Confuc|Luther|Calvin|Augustine|Beowulf",
    r"Mill__|Hobbes|Locke|Rousseau|Machiavelli|Emerson|Thoreau|Tacitus",
    r"Herodotus|Plutarch|Joyce|Chaucer|Malory|Spenser|Blake|Keats|Byron",
    r"Gibbon|Veblen|Du Bois|Federalist|Bible|Koran|Upanishad|Gita",
    r"William James|Russell|Einstein|Poems|Sophocles|Euripides|Aeschylus|Ibsen",
    r"Shaw__|Wilde__The Imp",
    flags=re.IGNORECASE,
)
HELD_OUT = any_of(r"Lilac Fairy", r"Doctor Dolittle", r"Marvelous Land", r"Book of Dragons")

STATED_YEAR = re.compile(r"## Year: *(\d{4})")
LICENCE_BEFORE = re.compile(r"\*\*\* ?START OF.*?\*\*\*", re.DOTALL)
LICENCE_AFTER = any_of(r"\*\*\* ?END OF", r"End of (the )?Project Gutenberg")
HEADING_LINES = re.compile(r"^-------\s*$|^#+ (Title|Author|Year).*$", re.MULTILINE)
EDITORS_NOTES = any_of(r"\[Illustration[^\]]*\]", r"\[Footnote[^\]]*\]", r"\[Transcriber[^\]]*\]", r"\[\d+\]")
EMPHASIS_MARKS = re.compile(r"[_*]")
PARAGRAPH_BREAK = re.compile(r"\n\s*\n")
CREDITS = re.compile(r"Project Gutenberg|gutenberg|Produced by|E-text|Proofread|Transcrib|Copyright|http")
CHAPTER_HEADING = re.compile(r"(CHAPTER|BOOK|PART|Chapter) ")

# A small vocabulary has no room for two kinds of quotation marks.
PLAIN_PUNCTUATION = str.maketrans(
    {
        "\N{LEFT SINGLE QUOTATION MARK}": "'",
        "\N{RIGHT SINGLE QUOTATION MARK}": "'",
        "\N{LEFT DOUBLE QUOTATION MARK}": '"',
        "\N{RIGHT DOUBLE QUOTATION MARK}": '"',
        "\N{EM DASH}": "--",
        "\N{EN DASH}": "-",
        "\N{NO-BREAK SPACE}": " ",
    }
)


class SourceFile(NamedTuple):
    """A book as it lies in a collection."""

    name: str
    path: Path


class Book(NamedTuple):
    """A book of the corpus: its name (`AUTHOR__TITLE` and the suffix of its file) and its paragraphs."""

    name: str
    paragraphs: list[str]

    @property
    def text(self) -> str:
        """The whole book, its paragraphs set apart by an empty line."""
        return "\n\n".join(self.paragraphs)


def flat_name(path: Path) -> str:
    """Name a book after its author's folder and its own file: `AUTHOR/TITLE.md` makes `AUTHOR__TITLE.md`."""
    author = UNUSUAL_IN_NAMES.sub("_", path.parent.name.strip())
    title = UNUSUAL_IN_NAMES.sub("_", path.stem)[:LONGEST_TITLE]
    return f"{author}__{title}{path.suffix}"


def list_collection(folder: Path, suffix: str) -> list[SourceFile]:
    """List a collection's books in the order of their names.

    The order matters: of two editions of a story the first one is kept.
    """
    files = sorted(SourceFile(flat_name(path), path) for path in folder.glob(f"*/*{suffix}"))
    if not files:
        raise SystemExit(f"No books in {folder}: expected a clone of the collection (AUTHOR/TITLE{suffix})")
    return files


def stated_year(path: Path) -> int:
    """Read the year of a book from its heading."""
    with path.open(encoding="utf-8", errors="ignore") as file:
        match = STATED_YEAR.search(file.read(HEADING_LENGTH))
    return int(match.group(1)) if match else YEAR_IF_UNSTATED


def select_fairy(classics: Iterable[SourceFile], gutenberg: Iterable[SourceFile]) -> list[SourceFile]:
    """Choose the fairy tales and children's books of both collections."""
    return [file for file in classics if FAIRY_CLASSICS.match(file.name)] + [
        file for file in gutenberg if FAIRY_GUTENBERG.search(file.name) and not NO_STORIES.search(file.name)
    ]


def select_fiction(classics: Iterable[SourceFile]) -> list[SourceFile]:
    """Choose the other fiction, from the smaller collection alone: that is plenty for so small a model."""
    return [file for file in classics if not FAIRY_CLASSICS.match(file.name) and not NO_FICTION.search(file.name)]


def read_text(path: Path) -> str:
    """Read a book as UTF-8 or, where that fails, as Latin-1."""
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def without_licence(text: str) -> str:
    """Cut what Project Gutenberg set before and after the book."""
    before = LICENCE_BEFORE.search(text)
    if before:
        text = text[before.end() :]
    after = LICENCE_AFTER.search(text)
    return text[: after.start()] if after else text


def is_prose(paragraph: str) -> bool:
    """Tell a paragraph of a story from credits, headings and tables."""
    if len(paragraph) < SHORTEST_PARAGRAPH or CREDITS.search(paragraph):
        return False
    if paragraph.startswith("#") or paragraph.isupper() or CHAPTER_HEADING.match(paragraph):
        return False
    prose = sum(character.isalpha() or character in PROSE_PUNCTUATION for character in paragraph)
    return prose / len(paragraph) >= LEAST_SHARE_OF_PROSE


def prose_paragraphs(text: str) -> list[str]:
    """Reduce the text of a file to its paragraphs of prose, each on one line and in plain punctuation."""
    text = without_licence(text.replace("\r\n", "\n"))
    text = HEADING_LINES.sub("", text)
    text = EDITORS_NOTES.sub("", text)
    text = text.translate(PLAIN_PUNCTUATION)
    one_line_each = (re.sub(r"\s+", " ", paragraph).strip() for paragraph in PARAGRAPH_BREAK.split(text))
    unmarked = (EMPHASIS_MARKS.sub("", paragraph).strip() for paragraph in one_line_each)
    return [paragraph for paragraph in unmarked if is_prose(paragraph)]


def drop_repeated(paragraphs: Iterable[str], seen: set[str]) -> Iterator[str]:
    """Pass on the paragraphs that no book before has had, and add them to `seen`."""
    for paragraph in paragraphs:
        if len(paragraph) > LONGEST_REPEATABLE_PARAGRAPH:
            if paragraph in seen:
                continue
            seen.add(paragraph)
        yield paragraph


def load_books(files: Iterable[SourceFile]) -> list[Book]:
    """Read and clean books, keeping each longer paragraph only where it first occurs among them."""
    seen: set[str] = set()
    books = (Book(name, list(drop_repeated(prose_paragraphs(read_text(path)), seen))) for name, path in files)
    return [book for book in books if len(book.paragraphs) >= FEWEST_PARAGRAPHS]


def write_text(path: Path, text: str) -> None:
    """Write a text file that is the same on every system."""
    path.write_text(text, encoding="utf-8", newline="\n")


def write_set(books: Sequence[Book], json_path: Path, names_path: Path) -> None:
    """Write one set of books and the list of its names, and say how large it is."""
    write_text(json_path, json.dumps(books))
    write_text(names_path, "\n".join(book.name for book in books))
    characters = sum(len(paragraph) for book in books for paragraph in book.paragraphs)
    print(f"{json_path.name}: {len(books)} books, {characters / 1e6:.1f} million characters")


def write_corpus(fairy: Sequence[Book], fiction: Sequence[Book], held_out: Sequence[Book], output: Path) -> None:
    """Write the three sets of books.

    Everything is written aside and then moved into place, so that no broken-off run leaves half a corpus.
    """
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=output) as temporary:
        aside = Path(temporary)
        write_set(fairy, aside / "fairy.json", aside / "books-fairy-and-children.txt")
        write_set(fiction, aside / "fiction.json", aside / "books-other-fiction.txt")
        write_set(held_out, aside / "held_out.json", aside / "books-held-out.txt")
        write_text(aside / "held_out.txt", "\n\n\n".join(book.text for book in held_out))
        for file in aside.iterdir():
            file.replace(output / file.name)


def build_corpus(classic_books: Path, gutenberg: Path, output: Path) -> None:
    """Choose, read and clean the books, and write them in three sets.

    Args:
        classic_books: Clone of the Markdown collection.
        gutenberg: Clone of the Project Gutenberg collection.
        output: Folder to write to; made if missing.
    """
    classics = [file for file in list_collection(classic_books, ".md") if stated_year(file.path) < FIRST_PROTECTED_YEAR]
    # Read together, so that the held-out books and the fairy tales share nothing but short paragraphs.
    fairy_and_held_out = load_books(select_fairy(classics, list_collection(gutenberg, ".txt")))
    fairy = [book for book in fairy_and_held_out if not HELD_OUT.search(book.name)]
    held_out = [book for book in fairy_and_held_out if HELD_OUT.search(book.name)]
    write_corpus(fairy, load_books(select_fiction(classics)), held_out, output)


def main() -> None:
    """Read the command line and build the corpus."""
    parser = argparse.ArgumentParser(
        description="Build the storyteller's corpus from two public collections of public-domain books."
    )
    parser.add_argument(
        "--classic-books",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="clone of mlschmitt/classic-books-markdown",
    )
    parser.add_argument(
        "--gutenberg", type=Path, required=True, metavar="FOLDER", help="clone of rcdm-uga/Gutenberg_Text"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("corpus"),
        metavar="FOLDER",
        help="where to write (default: %(default)s)",
    )
    arguments = parser.parse_args()
    build_corpus(arguments.classic_books, arguments.gutenberg, arguments.output)


if __name__ == "__main__":
    main()
