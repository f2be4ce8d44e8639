/* Parts of pages that show explanations: picture, map, overlay, bars, scale, and the panel of them all.

   Every text is set as text, never as HTML: names and labels may hold anything. `src` is an address that can be loaded, such as
   a URL, a blob: or a data: address; pages make their own. An `entry` has name, label, target, top, picture, map and limit, as
   gallery.py describes them. */
"use strict";

const viewer = (() => {
  const COARSE = 160; // pixels: smaller images are shown with their pixels, not blurred
  const OPACITY = 85; // percent, of the map over the picture

  const RAISED = "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079"; // the characters of an exponent

  /* An element with properties (className, alt, ...) or attributes (aria-label, ...), and children: nodes or texts. */
  function element(tag, properties = {}, ...children) {
    const node = document.createElement(tag);
    for (const [key, value] of Object.entries(properties)) {
      if (key in node) node[key] = value;
      else node.setAttribute(key, value);
    }
    node.append(...children);
    return node;
  }

  /* A text to show where a name or a label is expected, which may be empty or blank. */
  const named = (text, otherwise = "(no name)") => (text.trim() ? text : otherwise);

  /* A text that keeps its direction of writing to itself, for use inside a sentence. */
  const isolated = (text) => "\u2068" + named(text) + "\u2069";

  /* A probability as text. What is not certain is not called 100%, nor what is possible 0%. */
  function percent(probability) {
    const shown = (100 * probability).toFixed(1);
    if (shown === "100.0" && probability < 1) return "> 99.9%";
    if (shown === "0.0" && probability > 0) return "< 0.1%";
    return shown + "%";
  }

  /* A number with two digits, by a power of ten where it is very small or large. */
  function rounded(value) {
    const size = Math.abs(value);
    if (value === 0 || (size >= 1e-3 && size < 1e5)) return String(Number(value.toPrecision(2)));
    const [digits, power] = value.toExponential(1).split("e");
    return digits + " \u00d7 10" + [...String(Number(power))].map((c) => RAISED["-0123456789".indexOf(c)]).join("");
  }

  /* An image in a square of its own, so that nothing jumps when it comes. */
  function image(kind, src, alt, { size, lazy = false }) {
    const node = element("img", { className: kind, alt, width: size, height: size, decoding: "async", draggable: false });
    if (lazy) node.loading = "lazy"; // before src, or the load begins at once
    node.addEventListener("load", () => node.classList.toggle("coarse", node.naturalWidth < COARSE));
    node.src = src;
    return node;
  }

  const pictureAlt = (entry) => "picture " + isolated(entry.name);
  const mapAlt = (entry) => "map of " + isolated(entry.target) + " for " + isolated(entry.name);
  const picture = (entry, options) => image("picture", entry.picture, pictureAlt(entry), options);
  const map = (entry, options) => image("map", entry.map, mapAlt(entry), options);

  const product = (entry, options) => image("map", entry.product, mapAlt(entry) + ", times the input", options);

  /* The picture in pale grey with the map multiplied over it; --map-opacity of an ancestor says how strongly. */
  function overlay(entry, options) {
    const alt = mapAlt(entry) + ", over the picture";
    return element("div", { className: "overlay", role: "img", "aria-label": alt },
      image("picture", entry.picture, "", options), image("map", entry.map, "", options));
  }

  /* A bar of a probability; the number itself stands beside it as text. */
  function bar(probability) {
    const node = element("span", { className: "bar", "aria-hidden": "true" });
    node.style.setProperty("--part", Math.min(Math.max(probability, 0), 1));
    return node;
  }

  /* The likeliest classes, pairs [label, probability], as bars with numbers. */
  function bars(top) {
    return element("ol", { className: "bars", role: "list" }, ...top.map(([label, probability]) =>
      element("li", {},
        element("span", { className: "bar-label", dir: "auto" }, named(label)),
        element("span", { className: "bar-number" }, percent(probability)),
        bar(probability))));
  }

  /* The colours of a map, with the value at which they end. */
  function scale(limit, unit) {
    return element("div", { className: "scale" },
      element("div", { className: "scale-bar", "aria-hidden": "true" }),
      element("div", { className: "scale-ends" },
        element("span", {}, "\u2212" + rounded(limit)), element("span", {}, "0"), element("span", {}, "+" + rounded(limit))),
      element("p", { className: "scale-unit", dir: "auto" }, unit));
  }

  /* A slider of the opacity of the maps inside `root`. */
  function opacitySlider(root) {
    const shown = element("output");
    const input = element("input", { type: "range", min: 0, max: 100, value: OPACITY });
    const set = () => {
      shown.value = input.value + "%";
      input.setAttribute("aria-valuetext", shown.value);
      input.style.setProperty("--part", input.value / 100);
      root.style.setProperty("--map-opacity", input.value / 100);
    };
    input.addEventListener("input", set);
    set();
    return element("label", { className: "slider" }, element("span", {}, "Opacity"), input, shown);
  }

  /* Everything about one entry: `root` to put into a page, `show(entry)` to fill it, as often as one likes. */
  function explanation(unit, size = 384) {
    const root = element("div", { className: "explanation" });
    const figure = (title, ...below) => {
      const frame = element("div", { className: "frame" });
      return [frame, element("figure", {}, frame, element("figcaption", {}, element("span", {}, title), ...below))];
    };
    const [pictureFrame, pictureFigure] = figure("Network input");
    const [mapFrame, mapFigure] = figure("Map");
    const [productFrame, productFigure] = figure("Times the input");
    const [overlayFrame, overlayFigure] = figure("Overlay", opacitySlider(root));
    const views = element("div", { className: "views" }, pictureFigure, mapFigure, productFigure, overlayFigure);
    const prediction = element("div");
    const target = element("p", { className: "target" });
    const colours = element("div");
    root.append(
      views,
      element("div", { className: "facts" },
        element("section", {}, element("h3", {}, "Likeliest classes"), prediction),
        element("section", {}, element("h3", {}, "The map explains"), target, colours)));
    overlayFigure.className = "wide";

    function show(entry) {
      pictureFrame.replaceChildren(picture(entry, { size }));
      mapFrame.replaceChildren(map(entry, { size }));
      overlayFrame.replaceChildren(overlay(entry, { size }));
      productFigure.hidden = !entry.product; // a change has none
      views.classList.toggle("three", !entry.product);
      productFrame.replaceChildren(...entry.product ? [product(entry, { size })] : []);
      prediction.replaceChildren(bars(entry.top));
      const also = entry.target === entry.label ? "the predicted class" : "not the predicted class";
      target.replaceChildren(element("bdi", {}, named(entry.target)), element("small", {}, also));
      colours.replaceChildren(scale(entry.limit, unit));
    }
    return { root, show };
  }

  return { element, named, isolated, percent, rounded, picture, map, overlay, bar, bars, scale, opacitySlider, explanation };
})();
