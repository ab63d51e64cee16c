// Search when the site is opened from disk. Browsers give no Worker to a page without a server, so its script runs in a
// hidden frame instead, with the same messages. The name of this file tells the theme's offline plugin that it is here.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      const inside = frame.contentWindow
      inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
      this.ready = new Promise((loaded, failed) => {
        const script = inside.document.createElement("script")
        script.src = url
        script.onload = () => loaded(inside)
        script.onerror = failed
        inside.document.head.append(script)
      })
    }

    postMessage(data) {
      this.ready.then(inside => inside.dispatchEvent(new MessageEvent("message", { data })))
    }
  }
}
