"""The frame of a page of the report: HTML head and style sheet, for phones and for wide screens.

Owns CSS and the head. Must not know what a page shows.
"""

from html import escape

CSS = """
:root { color-scheme: light; --ink: #1b2027; --soft: #5b6470; --line: #e3e6eb; --page: #f6f7f9; --card: #fff;
  --blue: #2563c9; --good: #0b7a56; --bad: #b3321f; --mark: #ffe39a; --mark-line: #e0a100; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.5; font-size: 16px;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  -webkit-text-size-adjust: 100%; }
main { max-width: 72rem; margin: 0 auto; padding: 1.25rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .4rem 0 .2rem; letter-spacing: -.015em;
  overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .1rem; letter-spacing: -.01em; }
p { margin: .2rem 0 .8rem; max-width: 46rem; }
.soft, .note { color: var(--soft); }
.note { font-size: .9rem; }
.eyebrow { color: var(--blue); font-weight: 650; font-size: .8rem; letter-spacing: .06em;
  text-transform: uppercase; }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1rem; margin: .8rem 0 0; font-size: .92rem; }
a { color: var(--blue); text-decoration: none; } a:hover { text-decoration: underline; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .75rem;
  margin: 1.2rem 0 .6rem; }
.card, .panel, .box, details { background: var(--card); border: 1px solid var(--line); border-radius: .7rem; }
.card { padding: .8rem 1rem .85rem; }
.card .name { color: var(--soft); font-size: .85rem; }
.card .value { font-size: 1.75rem; font-weight: 650; letter-spacing: -.02em; line-height: 1.25;
  font-variant-numeric: tabular-nums; }
.card .detail { font-size: .85rem; color: var(--soft); font-variant-numeric: tabular-nums; }
.good { color: var(--good); font-weight: 600; } .bad { color: var(--bad); font-weight: 600; }
.box { padding: .7rem 1rem; margin: .8rem 0; font-size: .92rem; }
.box ul { margin: .2rem 0; padding-left: 1.1rem; }
.warn { background: #fff8e6; border-color: #f0d896; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20.5rem), 1fr));
  gap: .75rem; margin-top: .7rem; }
.panel { margin: 0; padding: .75rem .85rem .5rem; }
.panel figcaption { font-weight: 620; font-size: .95rem; overflow-wrap: anywhere; }
.panel .unit { color: var(--soft); font-weight: 400; }
.panel svg { display: block; width: 100%; height: auto; margin-top: .35rem; }
.panel svg text { font-family: inherit !important; }
.panel .note { margin: .1rem 0 .25rem; font-size: .82rem; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem .9rem; font-size: .84rem; color: var(--soft);
  font-variant-numeric: tabular-nums; }
.legend i { display: inline-block; width: .7rem; height: .7rem; border-radius: .2rem; margin-right: .35rem; }
.legend b { color: var(--ink); font-weight: 600; }
details { margin: .6rem 0; } summary { cursor: pointer; padding: .65rem .9rem; font-size: .95rem;
  overflow-wrap: anywhere; }
details > div { padding: 0 .9rem .9rem; }
.badge { display: inline-block; min-width: 4.2rem; text-align: center; padding: .05rem .5rem;
  margin-right: .5rem; border-radius: 1rem; font-size: .8rem; font-weight: 600; background: #eceff3;
  color: var(--soft); }
.badge.good { background: #def3ea; color: var(--good); }
.badge.bad { background: #fae3df; color: var(--bad); }
.response { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 30rem; overflow-y: auto;
  background: var(--page); border-radius: .5rem; padding: .7rem .8rem; font-size: .84rem; line-height: 1.55;
  font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
mark { background: var(--mark); color: inherit; border-radius: .15rem;
  border-bottom: 2px solid var(--mark-line); }
dl.facts { display: grid; grid-template-columns: max-content 1fr; gap: .1rem .9rem; margin: .3rem 0;
  font-size: .88rem; }
dl.facts dt { color: var(--soft); } dl.facts dd { margin: 0; overflow-wrap: anywhere; }
.settings { columns: 19rem; column-gap: 2rem; }
.settings section { break-inside: avoid; margin-bottom: .9rem; }
.settings h3 { font-size: .92rem; margin: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .25rem .6rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th { color: var(--soft); font-weight: 600; }
code { font-size: .92em; font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
"""


def document(title: str, body: str) -> str:
    """A whole HTML document; `title` is escaped, `body` is HTML."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)} · N-GRPO</title><style>{CSS}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )
