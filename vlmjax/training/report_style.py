"""How the report looks: one style sheet, light and dark, screen and paper."""

CSS = """
:root { color-scheme: light dark;
  --paper: #fbfbf9; --card: #ffffff; --ink: #1d2025; --soft: #5d636e; --faint: #8c929c; --line: #e6e5e0;
  --wash: #f3f2ee;
  --c0: #2f62c9; --c1: #d2691a; --c2: #24875a; --c3: #9a3fb0; --c4: #b88a00; --c5: #0f8c9c;
  --right: #1f8a54; --wrong: #c63a32; --right-wash: #e5f4ec; --wrong-wash: #fbeae8; --heat: 47, 98, 201;
  --heat-bad: 198, 58, 50; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #14161a; --card: #1c1f24; --ink: #e8e9eb; --soft: #a5abb5; --faint: #777e89; --line: #2e3239;
  --wash: #23272d;
  --c0: #7ba6ff; --c1: #f29a55; --c2: #5cc795; --c3: #d190e4; --c4: #e0bd4a; --c5: #56c8d6;
  --right: #58c98f; --wrong: #f0766c; --right-wash: #1a3227; --wrong-wash: #3a2120; --heat: 123, 166, 255;
  --heat-bad: 240, 118, 108; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric: tabular-nums; -webkit-font-smoothing: antialiased; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 28px 64px; }
header .mark { color: var(--soft); font-weight: 600; letter-spacing: .04em; font-size: 13px; }
h1 { font-size: 34px; line-height: 1.15; margin: 4px 0 6px; letter-spacing: -.02em;
  overflow-wrap: anywhere; }
header p { margin: 0; color: var(--soft); }
section { margin-top: 44px; }
h2 { font-size: 20px; margin: 0 0 4px; letter-spacing: -.01em; }
h3 { font-size: 14px; margin: 0; font-weight: 600; }
.lead { margin: 0 0 14px; color: var(--soft); max-width: 92ch; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 16px 18px;
  break-inside: avoid; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(148px, 1fr)); gap: 12px;
  margin-top: 26px; }
.tile { padding: 13px 16px; }
.tile b { display: block; font-size: 23px; line-height: 1.25; letter-spacing: -.01em; font-weight: 650; }
.tile span { color: var(--soft); font-size: 13px; }
.grid2 { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(330px, 100%), 1fr)); gap: 14px;
  }
.plot { padding: 13px 14px 8px; min-width: 0; display: flex; flex-direction: column; }
.plot .chart { margin-top: auto; }
.plot .head { display: flex; justify-content: space-between; align-items: baseline; gap: 12px; }
.plot .head h3 { min-width: 0; overflow-wrap: anywhere; }
.plot .now, .legend b { color: var(--ink); font-size: 13px; white-space: nowrap; font-weight: 500; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 11px; font-size: 12.5px; color: var(--soft);
  margin-top: 1px; min-height: 19px; }
.legend i { display: inline-block; width: 14px; height: 3px; border-radius: 2px; vertical-align: 4px;
  margin-right: 5px; }
.legend i.dash { height: 0; border-top: 2px dashed var(--faint); }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font: 11.5px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif;
  }
.chart .grid { stroke: var(--line); stroke-width: 1; } .chart .axis { stroke: var(--faint);
  stroke-width: 1; }
.chart .line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.chart .faint { stroke-width: 1.1; opacity: .28; } .chart .chance { stroke-width: 1.4;
  stroke-dasharray: 5 5; opacity: .7; }
.chart text { font-size: 13px; } .chart circle { stroke: none; } .broken { fill: var(--wrong); }
.c0 { stroke: var(--c0); } .c1 { stroke: var(--c1); } .c2 { stroke: var(--c2); } .c3 { stroke: var(--c3); }
  .c4 { stroke: var(--c4); } .c5 { stroke: var(--c5); }
circle.c0, i.c0 { fill: var(--c0); background: var(--c0); } circle.c1, i.c1 { fill: var(--c1);
  background: var(--c1); }
circle.c2, i.c2 { fill: var(--c2); background: var(--c2); } circle.c3, i.c3 { fill: var(--c3);
  background: var(--c3); }
circle.c4, i.c4 { fill: var(--c4); background: var(--c4); } circle.c5, i.c5 { fill: var(--c5);
  background: var(--c5); }
table { border-collapse: collapse; width: 100%; }
.results th { text-align: left; color: var(--soft); font-weight: 500; font-size: 13px;
  padding: 2px 14px 8px 0; }
.results td { padding: 7px 14px 7px 0; border-top: 1px solid var(--line); vertical-align: middle;
  white-space: nowrap; }
.results tr.first td { border-top-color: var(--faint); }
  .results tbody tr:first-child td { border-top-color: var(--line); }
.results .num { text-align: right; } .results .soft { color: var(--soft); }
  .results td.name { font-weight: 600; }
.results td.wide { width: 34%; min-width: 130px; padding-right: 18px; } .scroll { overflow-x: auto; }
.bar { position: relative; height: 10px; border-radius: 5px; background: var(--wash); }
.bar i { position: absolute; inset: 0 auto 0 0; border-radius: 5px; background: var(--c0); }
.bar u { position: absolute; top: -3px; bottom: -3px; width: 2px; margin-left: -1px; background: var(--c1);
  }
.matrix { max-width: 860px; margin: 0 auto; } .matrix image { image-rendering: pixelated; }
  .matrix .thumb { image-rendering: auto; }
.matrix .own { fill: none; stroke: #fff; stroke-width: 1.3; opacity: .85; } .matrix text { font-size: 11px;
  }
.query { display: grid; grid-template-columns: 200px 1fr; gap: 18px; padding: 11px 0;
  border-top: 1px solid var(--line); align-items: center; break-inside: avoid; }
.query:first-of-type { border-top: 0; } .query .ask { font-size: 14px; overflow-wrap: anywhere; }
.query .ask small, .tag { display: block; font-size: 12px; color: var(--soft); margin-top: 2px; }
.ask.seen { display: flex; gap: 12px; align-items: center; } .ask.seen div { min-width: 0; }
.found { display: grid; grid-template-columns: repeat(5, minmax(0, 1fr)); gap: 8px; }
.hit { border-radius: 9px; padding: 5px; text-align: center; font-size: 12px; color: var(--soft);
  border: 2px solid transparent; background: var(--wash); }
.hit.right { border-color: var(--right); background: var(--right-wash); }
.hit img { display: block; margin: 0 auto 3px; } .hit .mark { font-weight: 700; }
  .hit.right .mark { color: var(--right); } .hit .mark { color: var(--wrong); }
.hit.text { text-align: left; padding: 6px 9px; font-size: 12.5px; color: var(--ink);
  overflow-wrap: anywhere; }
.hit.text .mark, .hit.text small { font-size: 12px; } .hit small { color: var(--soft); }
.talk { grid-template-columns: minmax(220px, 1fr) 2fr; }
  .talk .found { grid-template-columns: repeat(auto-fill, minmax(130px, 1fr)); }
img.thumb { width: 80px; height: 80px; border-radius: 7px; object-fit: cover; background: var(--wash);
  flex: none; }
.confusion { width: auto; margin: 0 auto; font-size: 12.5px; } .confusion td, .confusion th { padding: 0;
  font-weight: 400; }
.confusion td { width: 38px; min-width: 26px; height: 30px; text-align: center;
  border: 1px solid var(--card); border-radius: 4px; background: var(--wash); }
.confusion th.row { text-align: right; padding-right: 9px; max-width: 240px; overflow: hidden;
  text-overflow: ellipsis; white-space: nowrap; }
.confusion th.col { vertical-align: bottom; height: 104px; }
  .confusion th.col div { writing-mode: vertical-rl; transform: rotate(180deg); margin: 0 auto 5px;
  max-height: 150px; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.confusion td.side { background: none; color: var(--soft); width: 56px; }
.mistakes { display: grid; grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); gap: 10px 18px;
  margin-top: 18px; }
.mistake { display: flex; gap: 12px; align-items: center; font-size: 13.5px; min-width: 0; }
  .mistake div { min-width: 0; overflow-wrap: anywhere; } .mistake small { color: var(--soft);
  display: block; }
.was { color: var(--right); } .said { color: var(--wrong); }
details { margin-top: 12px; } summary { cursor: pointer; font-weight: 600; }
  summary small { font-weight: 400; color: var(--soft); margin-left: 8px; }
.facts { columns: 2 360px; column-gap: 36px; margin-top: 12px; font-size: 13.5px; }
  .facts .group { break-inside: avoid; margin: 0 0 14px; }
.facts h3 { color: var(--soft); font-size: 13px; margin-bottom: 2px; } .facts dl { margin: 0;
  display: grid; grid-template-columns: minmax(110px, max-content) 1fr; gap: 1px 14px; }
.facts dt { color: var(--soft); overflow-wrap: anywhere; } .facts dd { margin: 0; overflow-wrap: anywhere;
  font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: 12.5px;
  line-height: 1.65; }
.none { color: var(--soft); margin: 18px 0; } footer { margin-top: 54px; color: var(--faint);
  font-size: 13px; }
@media (max-width: 720px) { main { padding: 24px 16px 48px; } .query, .talk { grid-template-columns: 1fr;
  gap: 8px; } h1 { font-size: 27px; } }
@media print { :root { --paper: #fff; --card: #fff; } main { max-width: none; padding: 0; }
  section { margin-top: 26px; } .card { border-color: #ddd; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""
