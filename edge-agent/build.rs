//! Lets the binaries find libtorch at run time without any environment variable: beside an installed program, in the checkout's
//! `.segue/`, or where `LIBTORCH` pointed at build time.

fn main() {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    let mut places = vec![
        "$ORIGIN/../lib/segue".to_owned(),
        "$ORIGIN/../../.segue/libtorch/lib".to_owned(),
    ];
    if let Ok(libtorch) = std::env::var("LIBTORCH") {
        places.push(format!("{libtorch}/lib"));
    }
    for place in places {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{place}");
    }
}
