// Draws the charts in the colours of the surroundings, and sorts tables. Nothing is fetched.
(() => {
  "use strict";
  const specs = JSON.parse(document.getElementById("specs").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const views = new Map();

  async function draw(place) {
    const spec = specs[Number(place.dataset.chart)][dark.matches ? "dark" : "light"];
    views.get(place)?.finalize();
    try {
      const options = {
        actions: false, renderer: "svg", ast: true, mode: "vega", defaultStyle: false,
        tooltip: { disableDefaultStyle: true, theme: "custom" },
      };
      views.set(place, await vegaEmbed(place, spec, options));
      place.dataset.drawn = "yes";
    } catch (error) {
      place.textContent = "This chart could not be drawn; the numbers are in the table below.";
      place.className = "broken";
      console.error(error);
    }
  }

  // What is near is drawn first; the rest follows when it comes into view, or is printed.
  const places = [...document.querySelectorAll("[data-chart]")];
  const waiting = new Set(places);
  const start = (place) => waiting.delete(place) && draw(place);
  const watch = new IntersectionObserver(
    (seen) => seen.filter((s) => s.isIntersecting).forEach((s) => { watch.unobserve(s.target); start(s.target); }),
    { rootMargin: "1500px" },
  );
  places.forEach((place) => watch.observe(place));
  addEventListener("beforeprint", () => waiting.forEach(start));
  dark.addEventListener("change", () => places.forEach((p) => waiting.has(p) || draw(p)));

  function value(row, column) {
    const cell = row.cells[column];
    return "value" in cell.dataset ? Number(cell.dataset.value) : cell.textContent.trim();
  }

  for (const button of document.querySelectorAll("thead button")) {
    button.addEventListener("click", () => {
      const head = button.closest("th");
      const body = head.closest("table").tBodies[0];
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...body.rows].sort((one, two) => {
        const a = value(one, head.cellIndex);
        const b = value(two, head.cellIndex);
        if (typeof a === "number" && typeof b === "number") return a - b;
        if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
        return a.localeCompare(b, undefined, { numeric: true });
      });
      body.append(...(down ? rows.reverse() : rows));
    });
  }
})();
