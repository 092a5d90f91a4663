//! Accuracy and forget fraction per epoch in Rust. The input is a correctness
//! matrix (n_epochs, n_samples) that NumPy wrote; it is counted as bytes.
//!
//! Write an input in Python:
//!     np.save("correct.npy", np.random.rand(5, 1001) < 0.6)
//! Build the library and this program, and run it:
//!     cmake -B build && cmake --build build
//!     rustc -L build -l static=fmn -l stdc++ docs/examples/forget_fraction.rs
//!     ./forget_fraction correct.npy
use std::{env, fs, process};

#[repr(C)]
struct Matrix {
    data: *const u8,
    n_epochs: i64,
    n_samples: i64,
    stride: i64,
    format: i32, // 0: a byte per sample
}

extern "C" {
    fn fmn_curve_counts(
        correct: *const Matrix,
        reference: i64,
        n_threads: i32,
        counts: *mut i64,
    ) -> i32;
}

/// Returns n_epochs, n_samples and the bytes of a bool matrix in an .npy file
/// (numpy.lib.format, version 1.0 or 2.0).
fn parse(file: &[u8]) -> Result<(usize, usize, &[u8]), &'static str> {
    let no_file = "an .npy file of version 1.0 or 2.0";
    if !file.starts_with(b"\x93NUMPY")
        || file.len() < 12
        || !(file[6] == 1 || file[6] == 2)
        || file[7] != 0
    {
        return Err(no_file);
    }
    let length = u16::from_le_bytes([file[8], file[9]]) as usize;
    let (begin, end) = match file[6] {
        1 => (10, 10 + length),
        _ => (
            12,
            12 + (length
                | (u16::from_le_bytes([file[10], file[11]]) as usize) << 16),
        ),
    };
    let header =
        std::str::from_utf8(file.get(begin..end).ok_or("a whole header")?)
            .map_err(|_| no_file)?;
    if !header.contains("'descr': '|b1'") {
        return Err("an array of bool, 'descr': '|b1'");
    }
    if !header.contains("'fortran_order': False") {
        return Err("C order, 'fortran_order': False (np.ascontiguousarray)");
    }
    let matrix = "'shape': (n_epochs, n_samples), at least one of each";
    let shape = header
        .split("'shape': (")
        .nth(1)
        .and_then(|s| s.split(')').next())
        .ok_or(matrix)?;
    let sizes: Vec<usize> = shape
        .split(", ")
        .map_while(|s| s.parse().ok())
        .filter(|&n| n > 0)
        .collect();
    match (sizes[..].as_ref(), shape.matches(',').count()) {
        (&[n_epochs, n_samples], 1) => {
            let short = "n_epochs * n_samples bytes after the header";
            let size = n_epochs
                .checked_mul(n_samples)
                .ok_or("a matrix that can be addressed")?;
            let bytes = file.get(end..).and_then(|rest| rest.get(..size));
            Ok((n_epochs, n_samples, bytes.ok_or(short)?))
        }
        _ => Err(matrix),
    }
}

fn main() {
    let path = env::args().nth(1).unwrap_or_else(|| {
        eprintln!("usage: forget_fraction correct.npy");
        process::exit(2)
    });
    let fail = |expected: &str| -> ! {
        eprintln!("{path}: expected {expected}");
        process::exit(1)
    };
    let file =
        fs::read(&path).unwrap_or_else(|_| fail("a file that can be read"));
    let (n_epochs, n_samples, bytes) =
        parse(&file).unwrap_or_else(|expected| fail(expected));
    let stride = n_samples as i64;
    let matrix = Matrix {
        data: bytes.as_ptr(),
        n_epochs: n_epochs as i64,
        n_samples: stride,
        stride,
        format: 0,
    };
    // Four rows of zeros: fmn_curve_counts adds to them.
    let mut counts = vec![0i64; 4 * n_epochs];
    if unsafe {
        fmn_curve_counts(&matrix, n_epochs as i64 - 1, 0, counts.as_mut_ptr())
    } != 0
    {
        fail("a matrix that fmn_curve_counts accepts");
    }
    println!("epoch accuracy      F_e");
    for e in 0..n_epochs {
        let share = |count: i64| count as f64 / n_samples as f64;
        println!(
            "{:5} {:8.6} {:8.6}",
            e,
            share(counts[e]),
            share(counts[n_epochs + e])
        );
    }
}
