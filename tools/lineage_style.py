"""How the lineage's page looks: a tree that lies on wide screens and stands on narrow ones."""

STYLE = """
:root { color-scheme: light; --ink: #1d2733; --soft: #5b6875; --line: #d7dde4; --blue: #1f4e8c; --paper: #f6f8fb }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0; color: var(--ink); background: var(--paper) }
header { background: linear-gradient(120deg, #12233d, #1f4e8c 60%, #3b7dd8); color: #fff; padding: 2.4rem 1.5rem 2rem }
header > div { max-width: 1180px; margin-inline: auto }
h1 { font-size: clamp(1.5rem, 4vw, 2.3rem); line-height: 1.15; margin-block: 0 .5rem; letter-spacing: -.01em }
header p { margin-block: .2rem; opacity: .92 }
.banner { background: #d9822b; border-radius: 6px; padding: .3rem .8rem; font-weight: 600; opacity: 1;
  width: fit-content; margin-top: .8rem }
section { max-width: 1180px; margin: 1.2rem auto; background: #fff; border: 1px solid var(--line); border-radius: 10px;
  padding: 1rem 1.2rem 1.2rem }
h2 { font-size: 1.2rem; margin: 0 0 .6rem }
h3 { font-size: 1rem; margin: 1rem 0 .4rem; color: var(--blue) }
h4 { font-size: .9rem; margin: 0 0 .4rem }
.note { color: var(--soft); font-size: .85rem; margin: .1rem 0 .6rem }
a { color: var(--blue) }

.tree, .tree ul { list-style: none; margin: 0; padding: 0 }
.tree li { display: flex; align-items: center; position: relative; padding: .3rem 0 .3rem 1.4rem }
.tree > li { padding-left: 0 }
.tree ul { position: relative; margin-left: 1.4rem; flex: 1 }
.tree ul::before { content: ""; position: absolute; left: -1.4rem; top: 50%; width: 1.4rem;
  border-top: 2px solid #b9c6d6 }
.tree li li::before { content: ""; position: absolute; left: 0; top: 0; bottom: 0; border-left: 2px solid #b9c6d6 }
.tree li li::after { content: ""; position: absolute; left: 0; top: 50%; width: 1.4rem; border-top: 2px solid #b9c6d6 }
.tree li li:first-child::before { top: 50% }
.tree li li:last-child::before { bottom: 50% }
.tree li li:only-child::before { display: none }
.card { display: block; width: 14.2rem; flex: none; background: #fff; border: 1px solid var(--line); border-radius: 8px;
  padding: .5rem .7rem .55rem; color: inherit; text-decoration: none; box-shadow: 0 1px 3px #12233d14;
  border-top: 3px solid #3b7dd8; line-height: 1.3 }
.card:hover { box-shadow: 0 3px 10px #12233d2a }
.card b { display: block; font-size: .95rem }
.made, .from, .told, .cost { font-size: .75rem; color: var(--soft) }
.made, .from, .cost { display: block }
.from { color: #a35c14 }
.spark { width: 100%; height: 34px; display: block; margin: .3rem 0 .1rem }
.big { font-size: 1.25rem; font-weight: 650; font-variant-numeric: tabular-nums; color: var(--blue) }
@media (max-width: 1000px) {
  .tree li { display: block; padding: .3rem 0 .3rem 1.3rem }
  .tree > li { padding-left: 0 }
  .tree ul { margin-left: .5rem }
  .tree ul::before { display: none }
  .tree li li::before, .tree li li:first-child::before { display: block; top: 0; bottom: 0 }
  .tree li li:last-child::before, .tree li li:only-child::before { display: block; bottom: auto; height: 2rem }
  .tree li li::after { top: 2rem; width: 1.1rem }
  .card { width: 100%; max-width: 24rem }
}

.claims { list-style: none; margin: 0; padding: 0; display: grid; gap: .35rem 1.5rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)) }
.claims li { padding-left: 1.7rem; position: relative }
.claims li::before { position: absolute; left: 0; top: .1rem; width: 1.2rem; height: 1.2rem; border-radius: 50%;
  color: #fff; font-size: .75rem; line-height: 1.2rem; text-align: center }
.claims .holds::before { content: "✓"; background: #2f8f5b }
.claims .fails::before { content: "✗"; background: #b3261e }
.claims .fails { color: #8a1d17 }

.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .85rem }
.all { width: 100%; font-size: .8rem }
.all td, .all th { padding: .25rem .38rem; text-align: right; border-bottom: 1px solid #eceff2; white-space: nowrap }
.all thead tr:first-child th { text-align: center; color: var(--soft); font-weight: 500; border-bottom: 0 }
.all thead tr:first-child th + th { border-left: 4px solid #fff; background: #eef3fa }
.all td:first-child, .all th:first-child { text-align: left; position: sticky; left: 0; background: #fff }
.all .best { font-weight: 700; color: var(--blue); background: #eef3fa }
.bars { width: 100% }
.bars td { padding: .15rem .5rem; white-space: nowrap; width: 1% }
.bars .bar { width: 99%; padding: 0 }
.bars svg { width: 100%; height: 12px; display: block }
.bars rect { fill: #3b7dd8 }
@media (max-width: 700px) { .bars td:last-child { white-space: normal; min-width: 9rem } }

.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr)); gap: .9rem }
.grid.small { grid-template-columns: repeat(auto-fill, minmax(min(100%, 215px), 1fr)) }
.grid.four { grid-template-columns: repeat(auto-fill, minmax(min(100%, 250px), 1fr)) }
.grid.large { grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)) }
figure { margin: 0 }
.chart { border: 1px solid #e3e8ed; border-radius: 8px; padding: .6rem; background: #fff }
.chart figcaption { font-size: .82rem; margin-bottom: .3rem }
.chart svg, .chart img { width: 100%; height: auto; display: block }
.chart .note { margin: .1rem 0 0 }
.grid line, line.grid { stroke: #e8ecf1 }
.tick { font-size: 10px; fill: #5b6875 }
.key { margin-left: .6rem; color: var(--soft); white-space: nowrap }
.key i { display: inline-block; width: .9rem; height: 3px; border-radius: 2px; margin-right: .25rem;
  vertical-align: middle; background: #3b7dd8 }
.k-training { background: #8fb4e3 !important }
.k-held-out { background: #1f4e8c !important }
.k-reward { background: #d9822b !important }
.k-gold { background: #b8860b !important }
.k-kl { background: #7b5ea7 !important }
.sample { border: 1px solid #e3e8ed; border-radius: 8px; padding: .6rem .7rem; background: #fbfcfe }
.sample h4, .says { overflow-wrap: anywhere; white-space: pre-wrap }
.sample dl { margin: 0 }
.sample dt { font-size: .72rem; color: var(--soft); margin-top: .35rem }
.sample dd { margin: 0; font-size: .85rem; background: #fff; border-left: 3px solid #b9c6d6; padding: .15rem .5rem;
  max-height: 9rem; overflow: auto }
.sample .right { border-color: #2f8f5b }
.sample .wrong { border-color: #b3261e }
.seen { width: 100%; max-width: 13rem; display: block; border-radius: 6px; margin-bottom: .3rem }
.seen rect { fill: none; stroke-width: 2 }
.seen .drawn { stroke: #ff00d4 }
.seen .asked { stroke: #111; stroke-dasharray: 4 3 }
@media print { section { break-inside: avoid } body { background: #fff } }
"""
