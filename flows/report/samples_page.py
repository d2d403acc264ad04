"""A page of samples with their whole texts, to search and to page through; self-contained HTML."""

import html
from pathlib import Path

from data_scoring.base.files import writing
from flows.display.html import html_page
from flows.display.visible_text import visible
from flows.report.samples import Sample, Samples

_STYLE = """<style>
.sample { border-top: 1px solid #8884; padding-top: .8rem; }
.sample p { margin: 0; } .place { color: gray; font-size: 13px; overflow-wrap: anywhere; }
.sample pre { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; }
nav { position: sticky; top: 0; background: Canvas; padding: .5rem 0; display: flex; gap: .6rem; align-items: center; }
nav input { flex: 1; font: inherit; padding: .2rem .5rem; }
</style>"""
# Without JavaScript, the page shows all samples.
_SCRIPT = """<script>
const samples = [...document.querySelectorAll(".sample")], perPage = 20;
const texts = samples.map(sample => sample.textContent.toLowerCase());
const nav = document.querySelector("nav"), [search] = nav.getElementsByTagName("input");
const [back, on] = nav.getElementsByTagName("button"), [where] = nav.getElementsByTagName("span");
let page = 0;
function show() {
  const wanted = search.value.toLowerCase(), found = samples.filter((_, i) => texts[i].includes(wanted));
  const pages = Math.max(1, Math.ceil(found.length / perPage));
  page = Math.min(Math.max(page, 0), pages - 1);
  for (const sample of samples) sample.hidden = true;
  for (const sample of found.slice(page * perPage, (page + 1) * perPage)) sample.hidden = false;
  where.textContent = `${found.length} of ${samples.length} samples, page ${page + 1} of ${pages}`;
  back.disabled = page === 0; on.disabled = page === pages - 1;
}
search.oninput = () => { page = 0; show(); };
back.onclick = () => { page--; show(); }; on.onclick = () => { page++; show(); };
nav.hidden = false; show();
</script>"""
_NAV = (
    '<nav hidden><input type="search" placeholder="Search texts, files, sources and reasons">'
    "<button>Previous</button><button>Next</button><span></span></nav>"
)


def write_samples_page(path: Path, run_name: str, found: Samples) -> None:
    """Write the page `path` of the samples that were found in the run `run_name`."""
    body = "".join(_sample(number, sample) for number, sample in enumerate(found.samples, start=1))
    lead = f'{_STYLE}<p class="lead">{html.escape(found.title)}.</p>'
    with writing(path) as temporary:
        page = html_page(f"{run_name}: samples", f"{lead}{_NAV}{body}{_SCRIPT}")
        temporary.write_text(page, encoding="utf-8")


def _sample(number: int, sample: Sample) -> str:
    text = visible(sample.text, kept="\n\t")
    # A browser drops a line break at the start of <pre>.
    return (
        f'<section class="sample"><p><b>{number:,}</b> {html.escape(sample.summary)}</p>'
        f'<p class="place">{html.escape(visible(sample.place))}</p>'
        f'<pre dir="auto">\n{html.escape(text)}</pre></section>'
    )
