"""Formulas as rows' docstrings write them, in plain letters, typeset as MathML where they are mathematics and left alone where they are words.

`p_ij = exp(s_ij) / sum_j exp(s_ij)`: names with subscripts (`_`) and superscripts (`^`), Greek letters by name, hats (`q^_i`), primes, `sqrt(...)`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

GREEK = {
    name: chr(code)
    for start, names in (
        (
            0x3B1,
            "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho - sigma tau upsilon phi chi psi omega",
        ),
        (
            0x391,
            "Alpha Beta Gamma Delta Epsilon Zeta Eta Theta Iota Kappa Lambda Mu Nu Xi Omicron Pi Rho - Sigma Tau Upsilon Phi Chi Psi Omega",
        ),
    )
    for code, name in enumerate(names.split(), start)
} | {"eps": "ε", "lam": "λ", "infinity": "∞", "inf": "∞"}
LARGE = {"sum": "∑", "prod": "∏"}
NAMED = """
    abs acos argmax argmin asin atan bilinear clip concat conv cos cosine det diag dwconv elu exp expm1 gelu log logsigmoid logsumexp
    LN ln lrelu max mean median min MLP norm pool rank relu RMS rms round sg sigmoid sign silu sin softmax softplus sqrt std swish
    tanh tan topk tril var
"""
FUNCTIONS = frozenset(NAMED.split())
OPERATORS = {"<=": "≤", ">=": "≥", "!=": "≠", "->": "→", "<-": "←", "+-": "±", "*": "∗", "-": "−", "~": "∼", "(x)": "⊗", "(.)": "⊙"}
TOKEN = re.compile(
    r"(?P<code>`[^`]*`)|(?P<word>[A-Za-z]+'[a-z]+|\d-D\b)|(?P<number>\d+x\d+|\d+(?:,\d{3})+|\d+(?:\.\d+)?(?:e-?\d+)?)|(?P<name>[A-Za-z]+'*)"
    r"|(?P<operator><=|>=|!=|->|<-|\+-|(?<= )\(x\)(?= )|(?<= )\(\.\)(?= )|[-+*/=<>~|()\[\]{},;:.!^_])|(?P<space>\s+)|(?P<other>.)"
)
# What a function or a sum is applied to, after a space: a letter, a Greek one, a name with scripts or brackets.
APPLIED = re.compile(rf" (?:\||-?[A-Za-z](?![A-Za-z])|(?:{'|'.join(GREEK)})(?![A-Za-z])|[A-Za-z]+'*[_^(])")
ARTICLE = re.compile(r" [A-Za-z]{2,}(?![_^(A-Za-z])")
SHORT_WORDS = {"In", "It", "Of", "No", "To", "If", "As", "At", "By", "On", "Or", "So", "An", "Is", "We", "Up", "Do"}
SCRIPT = re.compile(r"(-\d+(?:/\d+)?|\d+x\d+|\d+|-?[A-Za-z0-9]+'*|[*+])")


@dataclass(frozen=True)
class Piece:
    """A token. math: whether it makes a run mathematics ("yes"), goes with its neighbours ("either"), or is a word ("no")."""

    html: str
    math: str
    text: str


def letters(name: str) -> str:
    """A name without scripts: one letter slanted, Greek as its letter, functions and longer names upright."""
    bare, primes = name.rstrip("'"), "′" * (len(name) - len(name.rstrip("'")))
    shown = f"<mi>{GREEK.get(bare, bare)}</mi>"
    if len(bare) == 2 and bare not in FUNCTIONS and bare not in GREEK and bare.islower():
        shown = f"<mrow><mi>{bare[0]}</mi><mi>{bare[1]}</mi></mrow>"
    return f'<mrow>{shown}<mo lspace="0" rspace="0">{primes}</mo></mrow>' if primes else shown


def closing(text: str, at: int) -> int:
    """The place of the bracket that closes the one at `at`; -1: none does."""
    pairs, depth = {"(": ")", "{": "}", "[": "]"}, 0
    for place in range(at, len(text)):
        depth += (text[place] == text[at]) - (text[place] == pairs[text[at]])
        if depth == 0:
            return place
    return -1


def script(text: str, at: int) -> tuple[str, int]:
    """What stands below or above, from `at` on, and where it ends; ("", at): nothing does."""
    if at < len(text) and text[at] in "{(" and (end := closing(text, at)) > 0:
        inner = row(text[at + 1 : end])
        return (inner if text[at] == "{" else f'<mrow><mo stretchy="false">(</mo>{inner}<mo stretchy="false">)</mo></mrow>'), end + 1
    if found := SCRIPT.match(text, at):
        return row(found[0]), found.end()
    return "", at


def scripted(base: str, text: str, at: int, large: bool = False) -> tuple[str, int]:
    """A base with all its scripts; `^` with nothing to raise is a hat."""
    below = above = ""
    while at < len(text) and text[at] in "_^":
        if text[at] == "_":
            found, end = script(text, at + 1)
            if not found:
                break
            below += found
        else:
            found, end = script(text, at + 1)
            if found:
                above += found
            else:
                base, end = f'<mover accent="true">{base}<mo>^</mo></mover>', at + 1
        at = end
    if below and above:
        return f"<msubsup>{base}<mrow>{below}</mrow><mrow>{above}</mrow></msubsup>", at
    if below or above:
        tag = "msub" if below else "msup"
        return f"<{tag}>{base}<mrow>{below or above}</mrow></{tag}>", at
    return base, at


def mathematical(name: str, text: str, at: int) -> bool:
    """Whether a name without scripts, which ends at `at`, is no word of a sentence."""
    word, follows = name.rstrip("'"), text[at : at + 1]
    if len(word) == 1:
        return word != name or word not in "aAI" or not ARTICLE.match(text, at)
    if word in FUNCTIONS:
        return follows in ("(", "|") or APPLIED.match(text, at) is not None
    mixed = len(word) == 2 and any(letter.isupper() for letter in word) and word not in SHORT_WORDS
    return word in GREEK or mixed or (follows == "(" and len(word) == 2)


def pieces(text: str) -> Iterator[Piece]:
    at = 0
    while at < len(text):
        token = TOKEN.match(text, at)
        assert token is not None
        start, at, found = at, token.end(), token[0]
        follows = text[at : at + 1]
        if token.lastgroup == "code":
            yield Piece(f"<code>{escape(found[1:-1])}</code>", "no", found)  # only between words
        elif token.lastgroup == "space":
            yield Piece('<mspace width="1.5em"/>' if len(found) > 1 else '<mspace width="0.2em"/>', "either", found)
        elif token.lastgroup == "number":
            html, at = scripted(f"<mn>{found.replace('x', '×')}</mn>", text, at)
            yield Piece(html, "either", text[start:at])
        elif found == "sqrt" and follows == "(" and (end := closing(text, at)) > 0:
            html, at = scripted(f"<msqrt>{row(text[at + 1 : end])}</msqrt>", text, end + 1)
            yield Piece(html, "yes", text[start:at])
        elif token.lastgroup == "word":
            yield Piece(escape(found), "no", found)
        elif found in LARGE:
            html, at = scripted(f"<mo>{LARGE[found]}</mo>", text, at)
            yield Piece(html, "yes" if at > token.end() or follows == "(" or APPLIED.match(text, at) else "no", text[start:at])
        elif found == "log" and follows == "2":
            yield Piece("<msub><mi>log</mi><mn>2</mn></msub>", "yes", "log2")
            at += 1
        elif token.lastgroup == "name":
            html, at = scripted(letters(found), text, at)
            yield Piece(html, "yes" if at > token.end() or mathematical(found, text, at) else "no", text[start:at])
        elif token.lastgroup == "operator":
            if found in (")", "]", "}", "|") and follows in ("^", "_"):
                html, at = scripted(f'<mo stretchy="false">{found}</mo>', text, at)
            elif found == "." and follows not in ("", ".") and (text[start - 1 : start] == " ") == (follows == " "):  # q.k and q . k
                html = "<mo>·</mo>"
            elif found == "|":
                html = '<mo stretchy="false" lspace="0" rspace="0">|</mo>'
            else:
                html = f'<mo stretchy="false">{escape(OPERATORS.get(found, found))}</mo>'
            yield Piece(html, "yes" if found in "<=>=!=->" and found not in "-!" else "either", text[start:at])
        else:
            yield Piece(f"<mtext>{escape(found)}</mtext>", "either", found)


def row(text: str) -> str:
    """All of a text as mathematics."""
    return "".join(f"<mtext>{escape(piece.text)}</mtext>" if piece.html[0] != "<" else piece.html for piece in pieces(text))


def line(text: str) -> str:
    """A line of words and mathematics: runs of pieces between words become MathML if one of them is mathematics for sure."""
    out, run = [], list[Piece]()

    def close() -> None:
        first, last = 0, len(run)
        while first < last and run[first].text.strip() in ("", ",", ".", ";", ":", "("):
            first += 1
        while last > first and run[last - 1].text.strip() in ("", ",", ".", ";", ":"):
            last -= 1
        if any(piece.math == "yes" for piece in run[first:last]):
            inner = run[first:last]
            if inner and sum(p.text == "(" for p in inner) < sum(p.text == ")" for p in inner) and first and run[first - 1].text == "(":
                first -= 1
            out.append(escape("".join(piece.text for piece in run[:first])))
            out.append("<math>" + "".join(piece.html for piece in run[first:last]) + "</math>")
            out.append(escape("".join(piece.text for piece in run[last:])))
        else:
            out.append(escape("".join(piece.text for piece in run)))
        run.clear()

    depth = 0
    for piece in pieces(text):
        depth += (piece.text in "([{") - (piece.text[0] in ")]}")
        if piece.math == "no":
            close()
            out.append(piece.html if piece.text[0] == "`" else escape(piece.text))
        elif (piece.text.isspace() and len(piece.text) > 1) or (piece.text in ",;" and depth == 0):  # a narrow page breaks the line here
            close()
            out.append(" \u2003" if piece.text.isspace() else piece.text)
        else:
            run.append(piece)
    close()
    return "".join(out)


def typeset(text: str) -> str:
    """A docstring's lines as HTML: the first is a title, words alone; lines that are set in stay so."""
    title, _, rest = text.partition("\n")
    made = [escape(title)]
    for one in rest.splitlines():
        inset = len(one) - len(one.lstrip())
        made.append(f'<span style="padding-left:{inset / 2:g}em">{line(one.strip())}</span>' if inset else line(one))
    return '<div class="formula">' + "<br/>\n".join(made) + "</div>"
