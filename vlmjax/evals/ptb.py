"""Captions as tokens the way COCO's scores want them: Stanford's PTBTokenizer 3.4.1 in Python, punctuation left out.

COCO's evaluation code runs the Java program with `-preserveLines -lowerCase` and removes punctuation (Chen et al. 2015,
"Microsoft COCO Captions", section 3.1). The rules here were found by giving that program text and looking at what came
back. As there, the longest match wins, its context included, and of equally long ones the rule that is named first.
"""

import re

from vlmjax.evals.ptb_characters import DIGITS, LETTERS, SIGNS

# What is left out. It is compared after lower-casing: that is why `-lrb-` and its like stay.
PUNCTUATION = frozenset("'' ' `` ` . ? ! , : - -- ... ;".split())

# Every character at which Java, Python or an editor may begin a new line.
_LINE_BREAKS = re.compile("[\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")

# Words that keep their full stop.
_ABBREVIATIONS = """
    adj adm adv al ala alex apr ariz assn assoc asst atty attys aug ave bhd bldg blvd brig bros calif capt cf cie
    cmdr co col colo comdr conn corp cos cpl ct dak dec dept det dr drs ed.d elec ens esq est etc ext feb fla fri ft
    ga gen gov govs hon inc ind insp intl invt jan jos jr jul jun kan kans ky lieut lt ltd maj mar md messrs mich
    minn mlle mme mo mon mont mr mrs ms msgr mt natl neb nev nov oct okla penn pfc ph ph.d plc pres prof profs pvt rd
    rep reps rev rt sen sens sep sept seq sfc sgt spc sq sr st ste supt supts sys tel tenn thu thurs treas tue tues
    univ va vs vt wed wis wisc wm wyo
"""
_STATES = "Ark Az Del Ill La Mass Miss Ore Pa Tex Wash"  # in lower case they are words of their own
_COMPANIES = "[mM][ft][gG]|[pP]?[pP][tT][ey][sS]?"  # mfg., mtg., pty., pte., ...
_NUMBERED = "art ca fig figs no nos op pp prop"  # before a number
# These begin a sentence, so that a single letter before them has lost its full stop to the one that ended there.
_BEGINNINGS = """
    A About According Additionally After An As At But Earlier He Her Here However If In It Last Many More Mr. Ms. Now
    Once One Other Our She Since So Some Such That The Their Then There These They This We What When While Yet You
"""
_FILES = """
    bat bmp c cgi class cpp dll doc docx exe gif gz h htm html jar java jpeg jpg mov mp3 pdf php pl png ppt ps py sql
    tar txt wav x xml zip
"""


def _either_case(words: str) -> str:
    """One of the words, the longest first, in any mixture of cases."""
    found = sorted(words.split(), key=len, reverse=True)
    return f"(?i:{'|'.join(map(re.escape, found))})"


def _capitals(words: str) -> str:
    """One of the words with a capital at its beginning, in any case after that."""
    return "(?:" + "|".join(f"{word[0]}(?i:{re.escape(word[1:])})" for word in words.split()) + ")"


_L, _D, _LD = f"[{LETTERS}]", f"[{DIGITS}]", f"[{LETTERS}{DIGITS}]"
_WORD = f"{_L}{_LD}*(?:[.!?]{_L}{_LD}*)*"
_NUMBER = f"(?:{_D}+(?:[.,:\u066b\u066c]{_D}+)*|(?:[.,:\u066b\u066c]{_D}+)+)"
_ACRONYM = r"[A-Za-z](?:\.[A-Za-z])+\."
_HYPHEN = "[-\u058a\u2010\u2011]"
_APOSTROPHE = "(?:['\x92\u2019]|&apos;)"
_ANY_APOSTROPHE = "(?:['`\x91\x92\u2018\u2019\u201b]|&apos;)"
_SHORT = "(?:[msdMSD]|[rR][eE]|[vV][eE]|[lL][lL])"  # is, am, are, have, will
_IS = f"(?:'{_SHORT}(?![A-Za-z])|(?:[\x92\u2019]|&apos;){_SHORT})"
_NOT = f"[nN]{_ANY_APOSTROPHE}[tT]"
_GAP = "[ \t\xa0]"
_END = "(?![^ \t\xa0])"
_SLASHED = "[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"
_QUOTES = "`\x91-\x94\xab\xbb\u2018\u2019\u201b-\u201d\u2039\u203a"
_URL = r" \t\"<>|(){}"
_HOST = r"[^ \t\"<>|.!?(){},/]+"
_MAIL = r" \t\"<>|()\xa0"

# Group 1 is the token; what an expression says after it is context.
_RULES = [
    re.compile(rule)
    for rule in (
        # Words that are two.
        "((?i:can))(?i:not)",
        "((?i:gon|wan))(?i:na)",
        "((?i:got))(?i:ta)",
        "((?i:lem|gim))(?i:me)",
        "((?i:mo|more))'[nN](?![A-Za-z])",
        "('[tT])(?i:is|was)",
        # Marks of HTML.
        "(</?[A-Za-z!?][^<>]*>)",
        "(&(?i:amp|lt|gt|quot|apos|nbsp|mdash|ndash|#[0-9]+);)",
        # Words, and what an apostrophe joins or separates.
        f"([A-Za-z]*[A-MO-Za-mo-z]){_NOT}",
        f"({_NOT})",
        f"({_WORD}){_IS}",
        f"({_IS})",
        f"({_WORD})",
        f"({_APOSTROPHE}(?i:em|till?|cause))",
        f"({_APOSTROPHE}[nN]{_APOSTROPHE})",
        f"('[nN]){_END}",
        "((?:[\x92\u2019]|&apos;)[nN])",
        f"({_APOSTROPHE}[0-9]0[sS])",
        f"({_APOSTROPHE}[0-9][0-9]){_END}",
        f"([A-HJ-XZn]{_ANY_APOSTROPHE}[A-Za-z]{_L}+)",
        f"([dDoOlL]{_ANY_APOSTROPHE}{_L}{_LD}+(?:-[A-Za-z]+)*)",
        f"({_L}+[aeiouyAEIOUY]{_ANY_APOSTROPHE}[aeiouA-Z]{_L}*)",
        f"([dDlL]{_APOSTROPHE}|[yYjJ]{_APOSTROPHE}(?=[A-Za-z]))",
        # Names of other kinds.
        r"([cC]\+\+|[cCfF]#)",
        f"((?i:https?)://[^{_URL}]+[^{_URL}.!?,-])",
        rf"((?i:www)\.(?:{_HOST}\.)*[A-Za-z]+)",
        rf"((?:{_HOST}\.)+(?i:com|net|org|edu)/[^{_MAIL}]+[^{_MAIL}.!?,-])",
        rf"([A-Za-z0-9][^{_MAIL}]*@(?:[^{_MAIL}.]+\.)*[^{_MAIL}.]+)",
        "(@[A-Za-z_][A-Za-z0-9_]*)",
        f"(#{_L}+)",
        rf"([A-Za-z0-9]+(?:\.[A-Za-z0-9]+)*\.{_either_case(_FILES)})(?![A-Za-z0-9])",
        "([A-Z]+(?:(?:&amp;|[+&])[A-Z]+)+)",
        # Numbers, money, dates, telephones.
        f"([+-]?{_NUMBER})",
        r"([A-Z]*\$)",
        r"((?:[0-9]{1,4}[- \xa0])?[0-9]{1,4}(?:\\?/|\u2044)[0-9]{1,4})",
        "([0-9]{1,2}[-/][0-9]{1,2}[-/][0-9]{2,4})",
        f"({_D}+{_L}{_LD}*)",
        "([\u207a\u207b\u208a\u208b]?(?:[\u2070\xb9\xb2\xb3\u2074-\u2079]+|[\u2080-\u2089]+))",
        r"(\([0-9]{2,3}\)[ \xa0]?[0-9]{3,4}[- \xa0]?[0-9]{3,5})",
        r"((?:\+{0,2}[0-9]{2,4}[- \xa0])?[0-9]{2,4}[- \xa0][0-9]{3,4}[- \xa0]?[0-9]{3,5})",
        # Slashes, hyphens, underscores within a word.
        rf"({_SLASHED}(?:\\?/{_SLASHED}){{1,2}})",
        rf"([A-Za-z0-9][A-Za-z0-9.,\xad]*(?:{_HYPHEN}(?:{_ACRONYM}|[A-Za-z0-9\xad]+))+)",
        f"({_L}{_LD}*(?:{_HYPHEN}{_LD}+)+)",
        f"({_LD}+(?:[-_]{_LD}+)+)",
        # A full stop that belongs to the word.
        rf"((?:{_WORD}|{_NUMBER})\.)[,;:\u3001]",
        rf"({_either_case(_ABBREVIATIONS)}\.)",
        rf"((?:{_COMPANIES}|{_capitals(_STATES)})\.)",
        rf"({_either_case(_NUMBERED)}\.){_GAP}?{_D}",
        f"({_ACRONYM})",
        rf"([A-Za-z])\.{_GAP}+{_capitals(_BEGINNINGS)}(?:{_GAP}|$)",
        r"([A-Za-z]\.)",
        # Faces, then signs by themselves.
        r"([<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]])(?![A-Za-z0-9])",
        r"([-^x=~<>']_[-^x=~<>']|\([-^x=~<>']_[-^x=~<>']\)|\(\^\^\))",
        r"(\.{3,5}|(?:\.[ \xa0]){2,4}\.)",
        rf"(''|[{_QUOTES}]{{2}})",
        r"([?!]{2,}|-{2,}|#{2,}|@{2,}|_+|<<|>>|\*+|(?:\\\*){1,3})",
        rf"([!-/:-@\[-`{{-~{SIGNS}{_QUOTES}\x80\x96\x97\xa2-\xa4\xbc-\xbe\u2013-\u2015\u2026\u20a0\u20ac\u2153\u2154])",
    )
]
# What no rule could read differently, for speed: nearly all of nearly every caption.
_PLAIN = re.compile(r"(?!(?i:cannot|gonna|wanna|gotta|lemme|gimme)\b)([A-Za-z]+)(?= |$)|([.,])(?=$)")

_SPELT = {
    **{"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"},
    **{"\xa2": "cents", "\xa3": "#", "\xa4": "$", "\x80": "$", "\u20a0": "$", "\u20ac": "$"},
    **{"\xbc": "1/4", "\xbd": "1/2", "\xbe": "3/4", "\u2153": "1/3", "\u2154": "2/3", "\xad": "-"},
    **{"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": "''", "&apos;": "'", "&nbsp;": "\xa0"},
    **dict.fromkeys(["\x96", "\x97", "\u2013", "\u2014", "\u2015", "&mdash;", "&ndash;"], "--"),
    **{"\u2026": "...", '"': "''", "\u201b": "`", "\u2039": "`", "\u203a": "'", "\xab": "``", "\xbb": "''"},
    **{"\x91": "`", "\x92": "'", "\x93": "``", "\x94": "''"},
    **{"\u2018": "`", "\u2019": "'", "\u201c": "``", "\u201d": "''"},
}
_PAIR = re.compile(f"[{_QUOTES}]{{2}}")
_DOTS = re.compile(r"\.{3,}|(?:\.[ \xa0])+\.")
_SHORTENED = re.compile(f"{_IS}|{_NOT}")


def tokenize(caption: str) -> str:
    """The tokens of a caption in lower case, without punctuation, with a space between them.

    Whatever the caption holds, line breaks of all kinds included, it stays one caption, and no other is looked at: the
    Java program reads a file of them and may take the beginning of the next line for the end of a sentence.
    A token may hold a no-break space (in `1 1/2`, in a mark of HTML), as there.
    """
    text = _LINE_BREAKS.sub(" ", caption)
    found, at = [], 0
    while at < len(text):
        if text[at] == " ":
            at += 1
            continue
        plain = _PLAIN.match(text, at)
        if plain:
            found.append(plain[0].lower())
            at = plain.end()
            continue
        matches = [match for match in (rule.match(text, at) for rule in _RULES) if match]
        if not matches:  # a character that the program does not know
            at += 1
            continue
        longest = max(matches, key=re.Match.end)
        found.append(_spelt(longest[1]))
        at = longest.end(1)
    return " ".join(token for token in found if token not in PUNCTUATION).rstrip()


def _spelt(token: str) -> str:
    """A token in the letters of the Penn Treebank: brackets, quotation marks and some signs have names there."""
    if token in _SPELT:
        return _SPELT[token]
    if _PAIR.fullmatch(token):
        return "".join(_SPELT.get(character, character) for character in token)
    if _DOTS.fullmatch(token):
        return "..."
    if not token.strip("-"):
        return "-" if len(token) == 1 else "--"
    if _SHORTENED.fullmatch(token):
        token = re.sub("[\x92\u2019]|&apos;", "'", token.replace("\u2018", "`").replace("\x91", "`"))
    token = token.replace("\xad", "").replace("&amp;", "&").replace(" ", "\xa0")
    return token.replace("(", "-lrb-").replace(")", "-rrb-").lower()
