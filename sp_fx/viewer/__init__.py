"""Pages that show pictures, maps and predictions: `viewer.css` and `viewer.js` are the parts, `gallery` a page made of them."""
