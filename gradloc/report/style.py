"""The style sheet of every report, so that the demo's and a comparison's look alike."""

STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #f4f5f7; color: #1f2430;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 940px; margin: 0 auto; padding: 40px 44px 56px; background: #fff; }
h1 { font-size: 32px; line-height: 1.2; margin: 0 0 14px; letter-spacing: -0.01em; }
h2 { font-size: 22px; margin: 44px 0 12px; padding-top: 18px; border-top: 1px solid #e3e5ea; }
h3 { font-size: 17px; margin: 26px 0 8px; }
p.lead { font-size: 18px; color: #333a48; }
p.note, figcaption { font-size: 14px; color: #5b6373; }
p.warning { background: #fff4d6; border-left: 4px solid #d98e04; padding: 10px 14px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
thead th { font-size: 13px; font-weight: 600; color: #5b6373; vertical-align: bottom;
  border-bottom: 2px solid #1f2430; }
th, td { padding: 8px 9px; text-align: right; vertical-align: top; }
td { border-bottom: 1px solid #e3e5ea; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tbody tr td:first-child { font-weight: 600; white-space: nowrap; }
tbody tr:first-child td { color: #5b6373; }
td small { display: block; font-size: 12px; font-weight: 400; color: #7a8292;
  white-space: nowrap; }
table.plain th, table.plain td { text-align: left; padding: 4px 12px 4px 0; color: inherit;
  font-weight: 400; border-bottom: 1px solid #eef0f3; white-space: normal; }
table.plain th { width: 180px; color: #5b6373; }
ul.findings li { margin-bottom: 8px; }
figure { margin: 14px 0; }
img { max-width: 100%; height: auto; }
svg { max-width: 640px; width: 100%; height: auto; font-size: 12px; }
svg line { stroke: #e3e5ea; }
svg text { fill: #3d4452; }
pre { background: #1f2430; color: #e8eaf0; padding: 16px 18px; border-radius: 6px;
  overflow-x: auto; font-size: 13px; line-height: 1.5; }
code { background: #eef0f3; border-radius: 3px; padding: 1px 4px; font-size: 0.88em; }
li { margin-bottom: 6px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 18px; margin: 8px 0 4px; }
dt { font-weight: 600; }
dd { margin: 0; }
@media (max-width: 700px) { main { padding: 24px 18px; } }
@media print { body { background: #fff; } }
"""
